"""transformers' DeiT and ViT against what they are turned into: logits, folders, preprocessing."""

import copy
import importlib
import json
import sys

import numpy as np
import pytest
import selection
import timm
import torch
from checking import assert_as_accurate, assert_at_most, assert_close, assert_equal, seed
from modelling import randomize

import deit_fast
from deit_fast import layers
from deit_fast.integrations.huggingface import convert, from_transformers
from deit_fast.pretrained import from_pretrained, save_pretrained

pytestmark = pytest.mark.slow

KINDS = ["DeiTForImageClassificationWithTeacher", "DeiTForImageClassification"]
KINDS += ["ViTForImageClassification"]
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
TINY |= {"intermediate_size": 256, "id2label": dict(enumerate("abcdefghijk"))}


@pytest.fixture(scope="module", autouse=True)
def hugging_face():
    global transformers
    selection.extra("hf", "transformers")
    import transformers


def theirs(kind=KINDS[0], **options):
    config = transformers.DeiTConfig if kind.startswith("DeiT") else transformers.ViTConfig
    seed(0)
    return randomize(getattr(transformers, kind)(config(**TINY | options))).eval()


def images(model, batch=2):
    size = model.config.image_size
    size = (size, size) if isinstance(size, int) else size
    seed(1)
    return torch.randn(batch, model.config.num_channels, *size)


def assert_same_logits(model, fast):
    """No further from transformers' in fp64 than twice transformers' own fp32, and with as little
    left in fp64 that nothing but rounding can differ. sdpa is the judge: eager attention always has
    a softmax in fp32."""
    x = images(model)
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")
    with torch.no_grad():
        true = exact(x.double()).logits
        assert_as_accurate(fast(x), model(x).logits, true)
        double = copy.deepcopy(fast).double()
        assert_close(double(x.double()), true)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_logits(kind, attention):
    model = theirs(kind)
    model.set_attn_implementation(attention)
    assert_same_logits(model, from_transformers(model, backend="torch"))


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_in_triton(kind, device):
    model = theirs(kind, num_hidden_layers=1).to(device)
    fast = from_transformers(model, backend="triton")
    x = images(model).to(device)
    true = copy.deepcopy(model).double()(x.double()).logits
    with torch.no_grad():
        assert_as_accurate(fast(x), model(x).logits, true)


VARIANTS = {
    "wide": {"image_size": (32, 96)},
    "other sizes": {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 101},
    "patch": {"patch_size": 8},
    "grey": {"num_channels": 1},
    "no qkv bias": {"qkv_bias": False},
    "eps": {"layer_norm_eps": 0.1},
    "seven classes": {"id2label": dict(enumerate("abcdefg"))},
}


# A variant is the same for every kind, so each kind takes its turn
TURNS = [(KINDS[i % 3], variant) for i, variant in enumerate(VARIANTS)]


@pytest.mark.parametrize("kind, variant", TURNS)
def test_variants_and_their_folders(kind, variant, tmp_path):
    model = theirs(kind, **VARIANTS[variant])
    fast = from_transformers(model, backend="torch")
    assert_same_logits(model, fast)
    fast.__dict__.pop("_model_args", None)  # as timm before 1.0.31
    save_pretrained(fast, tmp_path)
    again = from_pretrained(tmp_path, backend="torch").eval()
    with torch.no_grad():
        assert torch.equal(again(images(model)), fast(images(model)))
    assert again.pretrained_cfg["label_names"] == tuple(model.config.id2label.values())
    model.save_pretrained(tmp_path / "theirs")
    from_theirs = from_pretrained(tmp_path / "theirs", backend="torch").eval()
    with torch.no_grad():
        assert torch.equal(from_theirs(images(model)), fast(images(model)))


def test_both_heads_are_where_they_belong():
    model = theirs()
    fast = from_transformers(model, backend="torch")
    with torch.no_grad():
        expected = model(images(model))
        deit_fast.set_heads(fast, "class")
        assert_close(fast(images(model)), expected.cls_logits)
        deit_fast.set_heads(fast, "distill")
        got = fast(images(model))
        assert_close(got, expected.distillation_logits)


def test_gradients_without_a_head_for_the_distillation_token():
    """In train() mode too it is the class token's logits alone, and every weight learns."""
    model = theirs(KINDS[1]).train()
    fast = from_transformers(model, backend="torch")
    assert fast.training and type(fast) is layers.VisionTransformer
    x = images(model)
    upstream = torch.randn(2, 11)
    expected = torch.autograd.grad(
        model(x).logits, model.deit.embeddings.distillation_token, upstream
    )
    got = torch.autograd.grad(fast(x), fast.reg_token, upstream)
    assert_close(got, expected)


def test_device_dtype_mode_and_weights_of_its_own():
    model = theirs().double()
    fast = from_transformers(model)
    assert {p.dtype for p in fast.parameters()} == {torch.float64} and not fast.training
    with torch.no_grad():
        x = images(model).double()
        before = fast(x)
        assert_close(before, model(x).logits)
        model.cls_classifier.weight.zero_()
        model.deit.embeddings.cls_token.zero_()
        assert torch.equal(fast(x), before)
        copied = copy.deepcopy(fast)
        assert type(copied) is type(fast) and torch.equal(copied(x), before)
    assert from_transformers(theirs().train().half()).head.weight.dtype == torch.float16


NAMED = {
    ("ViTForImageClassification", 192, 3): "deit_tiny_patch16_224",
    (KINDS[0], 192, 3): "deit_tiny_distilled_patch16_224",
}


@pytest.mark.parametrize("kind, width, heads", NAMED)
def test_models_of_the_paper_get_their_names(kind, width, heads, tmp_path):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    model = theirs(kind, num_hidden_layers=12, image_size=224, **sizes)
    fast = from_transformers(model)
    fast.__dict__.pop("_model_args", None)
    fast.__dict__.pop("_traits", None)
    save_pretrained(fast, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == NAMED[kind, width, heads]
    assert config["deit_fast"] == {"eps": 1e-12}
    assert not config["pretrained_cfg"].keys() & {"tag", "license"}  # of timm's weights
    assert (
        not config.get("model_args", {}).keys()
        - {"num_classes", "in_chans", "global_pool"}
        - {"img_size"}
    )
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        expected = model(images(model, 1)).logits
        assert_close(timms(images(model, 1)), expected)


def test_large_ones_too_by_their_config():
    """Names alone; the weights of one layer stand for twelve."""
    for width, size, name in (
        (768, 384, "deit_base_distilled_patch16_384"),
        (768, 224, "deit_base_distilled_patch16_224"),
        (1024, 224, "deit_base_distilled_patch16_224"),
        (384, 384, "deit_small_distilled_patch16_224"),
    ):
        config = {
            "model_type": "deit",
            "hidden_size": width,
            "image_size": size,
            "id2label": {0: "x"},
        }
        heads = ("cls_classifier.weight", "distillation_classifier.weight")
        stored = convert(config, {head: torch.zeros(5, width) for head in heads})
        assert stored.pretrained_cfg["architecture"] == name
        assert stored.model_args["img_size"] == (size, size)
        assert stored.model_args["num_classes"] == 5
        assert "label_names" not in stored.pretrained_cfg  # one name for five classes
        assert stored.eps == 1e-12 and stored.model_args["mlp_ratio"] == 3072 / width


# Their folders


@pytest.fixture
def folder(tmp_path):
    theirs().save_pretrained(tmp_path)
    return tmp_path


def test_both_layouts_of_names(folder):
    """Files have transformers 4's names; transformers 5 has others in memory."""
    import safetensors.torch

    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    model = theirs()
    now = model.state_dict()
    assert "deit.encoder.layer.0.attention.attention.query.weight" in names
    assert "deit.layers.0.attention.q_proj.weight" in now
    safetensors.torch.save_file(
        now | {"deit.pooler.dense.weight": torch.zeros(64, 64)}, folder / "model.safetensors"
    )
    fast = from_pretrained(folder, backend="torch").eval()
    assert_same_logits(model, fast)


def test_folders_from_before_safetensors(folder):
    """Names as transformers 4 wrote them, and as transformers 5 has them in memory; a file of them
    is no checkpoint of a timm model."""
    import safetensors.torch

    expected = from_pretrained(folder).state_dict()
    states = [safetensors.torch.load_file(folder / "model.safetensors"), theirs().state_dict()]
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    for state in states:
        torch.save(state, path)
        assert_equal(dict(from_pretrained(folder).state_dict()), dict(expected))
        for name in ("deit_tiny", "deit_tiny_distilled"):
            with pytest.raises(ValueError, match="pytorch_model.bin has transformers' names: deit"):
                deit_fast.create_model(name, checkpoint=path)


def test_transformers_is_not_needed_to_read_its_folders(folder, monkeypatch):
    expected = from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it raises
    module = importlib.reload(sys.modules[convert.__module__])
    assert module.convert is not convert
    assert torch.equal(from_pretrained(folder).pos_embed, expected.pos_embed)


def test_a_config_with_nothing_but_what_differs(folder):
    """transformers leaves out what it likes to: the rest is its classes' default."""
    model = theirs(layer_norm_eps=1e-12, patch_size=16)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("layer_norm_eps", "patch_size", "num_channels", "qkv_bias", "hidden_act"):
        del config[key]
    path.write_text(json.dumps(config))
    assert_same_logits(model, from_pretrained(folder, backend="torch").eval())


def test_other_size_and_classes(folder):
    model = from_pretrained(folder, img_size=96)
    seed(0)
    expected = deit_fast.checkpoint.resize_pos_embed(
        theirs().deit.embeddings.position_embeddings, (4, 4), (6, 6), 2
    )
    assert_equal(model.pos_embed, expected)
    with pytest.warns(UserWarning, match="head.weight, head.bias"):
        assert from_pretrained(folder, num_classes=3).head_dist.out_features == 3


PROCESSORS = {
    "ViT": ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
    "DeiT": (
        "DeiTImageProcessor",
        {"size": {"height": 80, "width": 80}, "crop_size": {"height": 64, "width": 64}},
    ),
    "no crop": (
        "DeiTImageProcessor",
        {"size": {"height": 64, "width": 64}, "do_center_crop": False},
    ),
    "shortest edge": (
        "DeiTImageProcessor",
        {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}},
    ),
    "no normalization": (
        "ViTImageProcessor",
        {"size": {"height": 64, "width": 64}, "do_normalize": False},
    ),
    "own mean": (
        "ViTImageProcessor",
        {
            "size": {"height": 64, "width": 64},
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
            "resample": 3,
        },
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_preprocessing_gives_the_same_pixels(case, folder):
    from PIL import Image

    kind, options = PROCESSORS[case]
    processor = getattr(transformers, kind)(**options)
    processor.save_pretrained(folder)
    ramp = np.linspace(0, 255, 200)[:, None, None] * np.ones((1, 120, 3))
    ramp[..., 1] = np.linspace(255, 0, 120)
    ramp[80:, :, 2] = 17
    image = Image.fromarray(ramp.astype(np.uint8))
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    model = from_pretrained(folder)
    config = timm.data.resolve_model_data_config(model)
    got = timm.data.create_transform(**config)(image)
    assert got.shape == expected.shape
    apart = (got - expected).abs().mean().item() * min(config["std"])
    assert_at_most(apart, 1.5 / 255, "resizing rounds to bytes at other places")
    names = {2: "bilinear", 3: "bicubic"}
    assert config["interpolation"] == names[int(processor.resample)]


def test_preprocessors_as_transformers_4_wrote_them():
    """The image processor of facebook/deit-base-distilled-patch16-224: sizes are plain numbers."""
    old = {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3}
    old |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    state = {"classifier.weight": torch.zeros(5, 768)}
    cfg = convert({"model_type": "vit"}, state, old).pretrained_cfg
    assert cfg["crop_pct"] == 224 / 256 and cfg["crop_mode"] == "squash"
    assert cfg["interpolation"] == "bicubic" and cfg["mean"] == (0.485, 0.456, 0.406)


# What is refused


def test_models_that_are_refused():
    with pytest.raises(
        ValueError, match="DeiTModel, expected one of DeiTForImageClassificationWith"
    ):
        from_transformers(transformers.DeiTModel(transformers.DeiTConfig(**TINY)))
    for act in ("gelu_new", "relu", "quick_gelu"):
        with pytest.raises(ValueError, match=f"hidden_act '{act}', expected 'gelu'"):
            from_transformers(theirs(hidden_act=act))


def test_configs_and_weights_that_are_refused(folder):
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    for changes, match in (
        ({"hidden_act": "relu"}, "config.json: hidden_act 'relu'"),
        ({"hidden_size": "wide"}, "is not as transformers writes it .TypeError"),
        ({"id2label": dict.fromkeys("abcdefghijk")}, "is not as transformers writes it"),
        ({"patch_size": {"side": 16}}, "is not as transformers writes it .KeyError"),
        ({"num_attention_heads": 3}, "cannot build deit_tiny_distilled_patch16_224 with"),
        ({"num_hidden_layers": "2"}, "cannot build deit_tiny_distilled_patch16_224 with"),
        ({"num_hidden_layers": 3}, "does not fit VisionTransformerDistilled\n  missing: blocks.2"),
        ({"intermediate_size": 128}, "\n  misshaped: blocks.0.mlp.fc1.weight"),
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError, match=match) as error:
            from_pretrained(folder)
        assert len(str(error.value).splitlines()) == 1 + match.count("\n"), match
    path.write_text(json.dumps(whole))
    (folder / "preprocessor_config.json").write_text('{"size": {"longest_edge": 3}}')
    with pytest.raises(ValueError, match="is not as transformers writes it .KeyError: 'height'"):
        from_pretrained(folder)
    headless = transformers.DeiTModel(transformers.DeiTConfig(**TINY))
    headless.save_pretrained(folder)
    with pytest.raises(ValueError, match="the weights have no classifier, expected DeiTFor"):
        from_pretrained(folder)
