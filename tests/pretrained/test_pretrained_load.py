"""Loading: what was saved comes back, for us and for timm; damaged files are refused."""

import os

import pytest
import timm
import torch
from checking import assert_close, assert_equal
from modelling import images
from saved_models import DISTILLED, assert_equal_models, forget, read, refused, tiny, write
from tiers import slow_but
from torch import nn

import deit_fast
from deit_fast.checkpoint import resize_pos_embed
from deit_fast.pretrained import from_pretrained, save_pretrained


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny(), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", slow_but(deit_fast.NAMES, "deit_tiny_distilled"))
def test_round_trip(name, tmp_path):
    model = tiny(name)
    save_pretrained(forget(model), tmp_path)
    again = from_pretrained(tmp_path)
    assert again.training and type(again) is type(model) and again.blocks[1].backend == "auto"
    assert_equal_models(again, model)
    assert read(tmp_path)["architecture"] == deit_fast.NAMES[name]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_heads_come_back_unless_asked_otherwise(tmp_path):
    model = tiny(heads="distill")
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.heads == "distill"
    assert_equal_models(again, model)
    assert from_pretrained(tmp_path, heads="class").heads == "class"
    with pytest.raises(ValueError, match="heads: 'both'"):
        from_pretrained(tmp_path, heads="both")


@pytest.mark.parametrize("which", ["all", "one"])
def test_eps_comes_back(which, tmp_path):
    model = tiny()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for norm in norms if which == "all" else norms[2:3]:
        norm.eps = 0.5
    save_pretrained(model, tmp_path)
    stored = read(tmp_path)["deit_fast"]["eps"]
    assert stored == 0.5 if which == "all" else stored["blocks.1.norm1"] == 0.5
    assert_equal_models(from_pretrained(tmp_path), model)


def test_eps_given_through_a_norm_layer_that_is_no_json(tmp_path):
    import functools

    model = tiny(norm_layer=functools.partial(nn.LayerNorm, eps=0.3))
    save_pretrained(model, tmp_path)
    assert read(tmp_path)["deit_fast"] == {"eps": 0.3}
    assert_equal_models(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("options", [{}, {"img_size": (32, 96)}, {"in_chans": 1, "depth": 1}])
@pytest.mark.parametrize("name", [DISTILLED, "vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_timm_loads_the_folder(name, options, tmp_path):
    model = tiny(name, **options)
    save_pretrained(model, tmp_path)
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(timms) is model.timm_class
    x = images(model)
    with torch.no_grad():
        assert_close(timms(x), model(x))


def test_a_folder_that_timm_wrote_is_read(tmp_path):
    model = tiny()
    sizes = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64}
    plain = deit_fast.restore(tiny())
    timm.models.save_for_hf(plain, tmp_path, model_args=sizes, safe_serialization=True)
    assert_equal_models(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", ["deit_base_distilled_384", "vit_tiny_patch16_224"])
def test_data_config_is_timms(name, tmp_path):
    sizes = {"embed_dim": 64, "num_heads": 2, "depth": 2}
    plain = timm.create_model(deit_fast.NAMES.get(name, name), **sizes)
    fast = deit_fast.create_model(name, **sizes)
    expected = timm.data.resolve_model_data_config(plain)
    assert timm.data.resolve_model_data_config(fast) == expected
    save_pretrained(forget(fast), tmp_path)
    again = from_pretrained(tmp_path)
    assert timm.data.resolve_model_data_config(again) == expected
    assert again.pretrained_cfg["classifier"] == plain.pretrained_cfg["classifier"]


def test_own_preprocessing_and_labels_come_back(tmp_path):
    model = tiny()
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.77, "crop_mode": "squash"}
    own["interpolation"] = "bilinear"
    labels = tuple("abcdefghijk")
    model.pretrained_cfg |= own | {"label_names": labels, "num_classes": 11}
    model.pretrained_cfg |= {"colour": "blue", "state_dict": model.state_dict()}  # no config's
    # of the weights that it started from, and of their file
    source = {"custom_load": True, "label_offset": 1, "test_input_size": (3, 288, 288)}
    model.pretrained_cfg |= source
    save_pretrained(model, tmp_path)
    assert not any(read(tmp_path)["pretrained_cfg"].get(key) for key in source)
    again = from_pretrained(tmp_path)
    expected = own | {"input_size": (3, 64, 64)}  # not the 224 the architecture was trained at
    assert timm.data.resolve_model_data_config(again) == expected
    assert again.pretrained_cfg["label_names"] == labels
    model.reset_classifier(4)
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).pretrained_cfg.get("label_names") is None


def test_other_image_size_is_resized_from_the_stored_grid(tmp_path):
    model = tiny(img_size=(32, 128))  # 2 x 8 patches, as many as the 4 x 4 asked for
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path, img_size=64)
    expected = resize_pos_embed(model.pos_embed, (2, 8), (4, 4), 2)
    assert_equal(again.pos_embed, expected)
    assert not torch.equal(again.pos_embed, model.pos_embed)
    assert torch.equal(again.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


def test_other_number_of_classes_initializes_the_heads(folder):
    with pytest.warns(UserWarning, match="head.weight, head.bias, head_dist.weight"):
        model = from_pretrained(folder, num_classes=5)
    assert model.head.weight.shape == model.head_dist.weight.shape == (5, 64)
    assert torch.equal(model.norm.weight, tiny().norm.weight)


def test_damaged_configs(folder):
    path = folder / "config.json"
    whole = path.read_text()
    for text, match in {
        whole[:100]: "config.json: is no JSON",
        "": "config.json: is no JSON",
        "[" * 100_000: "config.json: is no JSON",
        "[1]": "holds a list, expected a JSON object",
        "{}": "neither timm's 'architecture' nor transformers' 'model_type'",
        '{"model_type": "bert"}': "model_type 'bert', expected 'deit' or 'vit'",
        '{"architecture": "deit_huge"}': "architecture 'deit_huge' is none of timm",
        '{"architecture": ["deit"]}': "is none of timm",
    }.items():
        path.write_text(text)
        assert len(refused(ValueError, match, folder).splitlines()) == 1, match
    path.write_bytes(b"\xff\xfe{}")
    refused(ValueError, "config.json: is no JSON", folder)
    for changes, match in (
        ({"pretrained_cfg": 7}, "is not as timm writes it"),
        ({"deit_fast": 7}, "is not as timm writes it"),
        ({"model_args": 7}, "is not as timm writes it"),
        ({"model_args": {"pretrained": True}}, "model_args has pretrained"),
        (
            {"model_args": {"embed_dim": "wide"}},
            "cannot build deit_tiny_distilled.* with",
        ),
        ({"model_args": {"nonsense": 1}}, "cannot build .*nonsense"),
        ({"deit_fast": {"eps": "small"}}, "eps 'small' does not fit"),
        ({"deit_fast": {"eps": {"norm3": 1e-6}}}, "norm3.* does not fit"),
        ({"deit_fast": {"heads": "both"}}, "heads: 'both'"),
    ):
        path.write_text(whole)
        write(folder, **changes)
        assert len(refused(ValueError, match, folder).splitlines()) == 1, match


def test_fields_of_a_newer_timm_are_left(folder):
    write(folder, pretrained_cfg=read(folder)["pretrained_cfg"] | {"colour": "blue"})
    assert_equal_models(from_pretrained(folder), tiny())


def test_missing_and_damaged_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:4]):
        path.write_bytes(content)
        message = refused(ValueError, "model.safetensors is truncated or no checkpoint", folder)
        assert len(message.splitlines()) == 1
    path.unlink()
    refused(FileNotFoundError, r"has no model.safetensors \(or, a folder here, pytorch_m", folder)
    (folder / "config.json").unlink()
    refused(FileNotFoundError, "has no config.json", folder)


def test_a_folder_from_before_safetensors(folder):
    model, saved = tiny(), tiny()
    model.norm.bias.data.fill_(7.0)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert_equal_models(from_pretrained(folder), saved)  # model.safetensors goes first
    (folder / "model.safetensors").unlink()
    assert_equal_models(from_pretrained(folder), model)
    torch.save(model, folder / "pytorch_model.bin")
    refused(ValueError, "pytorch_model.bin holds more than tensors: deit_fast.layers", folder)


def test_a_head_that_is_missing_is_initialized_if_asked_for(folder):
    save_pretrained(tiny(num_classes=0), folder)
    with pytest.warns(UserWarning, match="has no head.weight, head.bias, head_dist.weight, head_d"):
        model = from_pretrained(folder, num_classes=4)
    assert model.head_dist.weight.shape == (4, 64)
    assert_equal_models(from_pretrained(folder), tiny(num_classes=0))


def test_weights_that_do_not_fit_the_config(folder):
    save_pretrained(tiny(depth=3), folder.parent / "deep")
    config = (folder / "config.json").read_text()
    (folder.parent / "deep" / "config.json").write_text(config)
    refused(
        ValueError, "does not fit Vision.*\n  unexpected: blocks.2.attn", folder.parent / "deep"
    )
    # positions of another grid than config.json's are a misfit, not a reason to resize
    save_pretrained(tiny(img_size=32), folder.parent / "small")
    (folder.parent / "small" / "config.json").write_text(config)
    refused(ValueError, r"misshaped: pos_embed \(1, 6, 64\)", folder.parent / "small")
    refused(ValueError, "does not fit config.json", folder.parent / "small", img_size=96)
