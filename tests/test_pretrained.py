"""Folders in timm's hub format: what is saved comes back, for us and for timm, or is refused."""

import json
import os
import resource
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from checking import assert_close, assert_equal, seed
from huggingface_hub.errors import EntryNotFoundError
from modelling import TINY, images, randomize
from tiers import slow_but
from torch import nn

import deit_fast
from deit_fast.checkpoint import resize_pos_embed
from deit_fast.layers import VisionTransformer
from deit_fast.pretrained import from_pretrained, save_pretrained
from deit_fast.stored_model import mlp_ratio

DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"


def tiny(name=DISTILLED, heads="joint", **kwargs):
    seed(0)
    model = deit_fast.create_model(name, backend="torch", heads=heads, **TINY | kwargs)
    return randomize(model).eval()


def forget(model):
    """As timm before 1.0.31, which does not keep the keyword arguments."""
    model.__dict__.pop("_model_args", None)
    model.__dict__.pop("_traits", None)
    return model


def assert_equal_models(got, expected):
    state, wanted = got.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name
    x = images(expected)
    with torch.no_grad():
        assert torch.equal(got.eval()(x), expected.eval()(x))


def read(folder):
    return json.loads(Path(folder, "config.json").read_text())


def write(folder, **changes):
    config = read(folder) | changes
    Path(folder, "config.json").write_text(json.dumps(config))


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


VARIANTS = {
    "wide": {"img_size": (32, 96)},
    "patch": {"patch_size": 8},
    "no classes": {"num_classes": 0},
    "grey": {"in_chans": 1},
    "heads": {"num_heads": 1},
    "other MLP": {"mlp_ratio": 100.5 / 64},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
    "LayerScale": {"init_values": 0.1},
    "q and k norm": {"qk_norm": True},
    "average": {"global_pool": "avg"},
    "average without fc_norm": {"global_pool": "avg", "fc_norm": False},
    "average of all": {"global_pool": "avg", "pool_include_prefix": True},
    "no class token": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "no positions": {"pos_embed": "none"},
    "norm in front": {"pre_norm": True},
    "no final norm": {"final_norm": False},
    "dropout": {"drop_rate": 0.1, "drop_path_rate": 0.2},
}


@pytest.mark.parametrize(
    "variant", slow_but(VARIANTS, "wide", "LayerScale", "registers", "average")
)
def test_arguments_are_read_off_the_model(variant, tmp_path):
    model = tiny(PLAIN, **VARIANTS[variant])
    save_pretrained(forget(model), tmp_path)
    assert_equal_models(from_pretrained(tmp_path), model)


def test_dynamic_sizes_come_back(tmp_path):
    model = tiny(PLAIN, dynamic_img_size=True, dynamic_img_pad=True)
    save_pretrained(forget(model), tmp_path)
    x = torch.randn(1, 3, 40, 90)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path).eval()(x), model(x))


def test_only_what_is_not_the_architectures_is_stored(tmp_path):
    save_pretrained(forget(tiny(img_size=224, num_classes=1000, depth=3)), tmp_path)
    assert read(tmp_path)["model_args"].items() >= {"embed_dim": 64, "num_heads": 2}.items()
    assert not read(tmp_path)["model_args"].keys() & {"mlp_ratio", "patch_size", "qkv_bias"}
    assert "deit_fast" not in read(tmp_path)


def test_mlp_ratio_survives_rounding_down():
    assert int(11 * (15 / 11)) == 14
    for width in range(1, 200):
        for hidden in range(1, 900, 7):
            assert int(width * mlp_ratio(hidden, width)) == hidden


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_file_keeps_the_dtype_and_models_are_fp32(dtype, tmp_path):
    model = tiny().to(dtype)
    save_pretrained(model, tmp_path)
    stored = deit_fast.checkpoint.read_checkpoint(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    assert_equal_models(from_pretrained(tmp_path), model.float())


def test_plain_compiled_and_oddly_laid_out_models_are_saved(tmp_path):
    model = tiny()
    plain = timm.create_model(DISTILLED, **TINY)
    plain.load_state_dict(model.state_dict())
    plain = plain.to(memory_format=torch.channels_last)
    plain.head_dist.weight = nn.Parameter(plain.head_dist.weight.detach().T.contiguous().T)
    plain.norm.bias = plain.blocks[0].norm1.bias  # shared memory
    model.norm.bias = model.blocks[0].norm1.bias
    assert not plain.patch_embed.proj.weight.is_contiguous()
    save_pretrained(torch.compile(plain), tmp_path)
    assert_equal_models(from_pretrained(tmp_path), model)


def test_surgery_after_the_model_was_built_comes_back(tmp_path):
    model = tiny(PLAIN, in_chans=3)
    model.reset_classifier(4)
    model.patch_embed.proj = nn.Conv2d(1, 64, 16, 16)
    save_pretrained(model, tmp_path)
    assert_equal_models(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("on_meta", [True, False])
def test_saving_changes_neither_the_model_nor_the_random_numbers(on_meta, tmp_path, monkeypatch):
    real = timm.create_model

    def create_model(*args, **kwargs):
        """Some networks cannot be built without memory: what they raise then, as RegNet does."""
        if torch.empty(0).is_meta:
            raise NotImplementedError("needs values")
        return real(*args, **kwargs)

    model = tiny()
    if not on_meta:
        monkeypatch.setattr(timm, "create_model", create_model)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    before, state = dict(model.pretrained_cfg), torch.get_rng_state()
    save_pretrained(model, tmp_path)
    assert model.pretrained_cfg == before and torch.equal(torch.get_rng_state(), state)


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


@pytest.mark.slow
def test_models_that_are_no_vision_transformer(tmp_path):
    options = {"depth": 1, "img_size": 64, "num_classes": 5}
    model = deit_fast.create_model("cait_xxs24_224", backend="torch", **options).eval()
    randomize(model)
    with pytest.raises(ValueError, match="blocks.1.* would be") as error:
        save_pretrained(forget(model), tmp_path)
    assert "pass the keyword arguments" in str(error.value)
    assert not os.listdir(tmp_path)
    save_pretrained(model, tmp_path, depth=1)
    again = from_pretrained(tmp_path).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(again(x), model(x))
    # plain convolutional networks can be saved; their initialisation may need real memory
    model = forget(timm.create_model("regnety_002", num_classes=3, in_chans=1))
    save_pretrained(model, tmp_path / "conv")
    again = timm.create_model(f"local-dir:{tmp_path}/conv", pretrained=True)
    assert again.head.fc.out_features == 3 and again.stem.conv.in_channels == 1


def test_what_cannot_be_read_off_has_to_be_passed(tmp_path):
    model = forget(tiny(act_layer="relu"))
    with pytest.raises(ValueError, match=r"blocks.0.mlp.act is ReLU\(.*would be GELU"):
        save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, act_layer="relu")
    assert_equal_models(from_pretrained(tmp_path), model)


@pytest.mark.slow
def test_models_that_would_come_back_as_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_heads is 2, would be 4"):
        save_pretrained(tiny(), tmp_path, num_heads=4)
    with pytest.raises(ValueError, match="and 10 more"):
        save_pretrained(tiny(), tmp_path, depth=3)
    adapted = tiny()
    adapted.head = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 11))
    with pytest.raises(ValueError, match="head.0.weight is .64, 64., would be not there"):
        save_pretrained(adapted, tmp_path)

    class Mine(VisionTransformer):
        pass

    mine = tiny(PLAIN)
    mine.__class__ = mine.timm_class = Mine
    with pytest.raises(ValueError, match="the class is Mine, would be VisionTransformer"):
        save_pretrained(mine, tmp_path)
    with pytest.raises(ValueError, match="Sequential has no pretrained_cfg"):
        save_pretrained(nn.Sequential(tiny()), tmp_path)
    with pytest.raises(ValueError, match="norm_layer=.*cannot be written as JSON"):
        save_pretrained(tiny(), tmp_path, norm_layer=nn.LayerNorm)
    assert not os.listdir(tmp_path)


# Preprocessing


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


# Another size, other classes


def test_other_image_size_is_resized_from_the_stored_grid(tmp_path):
    model = tiny(img_size=(32, 128))  # 2 x 8 patches, as many as the 4 x 4 asked for
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path, img_size=64)
    expected = resize_pos_embed(model.pos_embed, (2, 8), (4, 4), 2)
    assert_equal(again.pos_embed, expected)
    assert not torch.equal(again.pos_embed, model.pos_embed)
    assert torch.equal(again.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


def test_other_number_of_classes_starts_the_heads_anew(folder):
    with pytest.warns(UserWarning, match="head.weight, head.bias, head_dist.weight"):
        model = from_pretrained(folder, num_classes=5)
    assert model.head.weight.shape == model.head_dist.weight.shape == (5, 64)
    assert torch.equal(model.norm.weight, tiny().norm.weight)


# An earlier model stays


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.mark.parametrize(
    "failing, earlier, links",
    [
        ("model.safetensors", True, True),
        ("config.json", True, True),
        ("config.json", True, False),
        ("config.json", False, True),
    ],
)
def test_a_failing_rename_leaves_what_was_there(failing, earlier, links, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    if earlier:
        save_pretrained(tiny(), tmp_path)
    before, real = contents(tmp_path), os.replace

    def replace(source, target):
        if Path(source).name == failing:
            raise OSError("the disk is gone")
        real(source, target)

    def no_links(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OSError, match="the disk is gone"):
        save_pretrained(tiny(PLAIN), tmp_path)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    save_pretrained(tiny(PLAIN), tmp_path)
    assert_equal_models(from_pretrained(tmp_path), tiny(PLAIN))


@pytest.mark.parametrize("limit", [100_000, 300], ids=["weights", "config"])
def test_a_full_disk_leaves_what_was_there(limit, folder, monkeypatch):
    """Files may not grow beyond the limit, which ends a write as a full disk does."""
    before = contents(folder)
    if limit < 1000:  # the weights have to fit for the config to be what fails
        monkeypatch.setattr(
            "safetensors.torch.save_file", lambda state, path, metadata: path.touch()
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = tiny(depth=3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as error:
            save_pretrained(other, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in str(error.value)
    assert contents(folder) == before


def test_the_weights_are_as_readable_as_the_config(folder):
    modes = {(folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


# What cannot be loaded


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match) as caught:
        from_pretrained(*args, **kwargs)
    return str(caught.value)


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


def test_a_head_that_is_not_there_begins_anew_if_asked_for(folder):
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


# Local or hub


def test_what_looks_local_is_never_looked_up(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "deit").write_text("")
    for path in ("./a", "../a/b", str(tmp_path / "a"), "~/no/such", "a/b/c", "a b", Path("timm/a")):
        refused(FileNotFoundError, "no such folder .*hub", path)
    refused(FileNotFoundError, "timm: has no config.json", "timm")
    refused(ValueError, "is a file, expected a folder", "timm/deit")


@pytest.fixture
def hub(folder, monkeypatch):
    """A hub with one model, and what it was asked for."""
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"404: {name}")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub(hub, folder):
    assert_equal_models(from_pretrained("timm/tiny.fb_in1k"), tiny())
    files = ["config.json", "model.safetensors"]
    assert hub == [("timm/tiny.fb_in1k", name, None) for name in files]
    hub.clear()
    from_pretrained("timm/tiny@refs/pr/1")
    assert hub == [("timm/tiny", name, "refs/pr/1") for name in files]
    (folder / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")  # from elsewhere never a pickle
    hub.clear()
    refused(FileNotFoundError, "timm/tiny: has no model.safetensors", "timm/tiny")
    assert hub == [("timm/tiny", name, None) for name in files]
    (folder / "config.json").unlink()
    refused(FileNotFoundError, "timm/tiny: has no config.json", "timm/tiny")


def test_hub_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("timm/deit_no_such", "facebook/a..b"):
        message = refused(FileNotFoundError, "no such folder, and config.json did not come", name)
        assert "Hugging Face hub (offline, or no such model?" in message
        assert len(message.splitlines()) == 1
