"""Weights from files: what loads, what is resized, and what is refused with a clear line."""

import pytest
import safetensors.torch
import timm
import torch
from checking import assert_close, assert_differ, assert_equal, seed, seeded
from modelling import TINY, randomize, tiny_pair
from torch import nn

import deit_fast
from deit_fast.checkpoint import read, resize_pos_embed
from deit_fast.checkpoint.fit import PRETRAINING

NAME = "deit_tiny_distilled"


def build(**kwargs):
    return deit_fast.create_model(NAME, backend="torch", **TINY | kwargs).eval()


@pytest.fixture
def source():
    return randomize(
        timm.create_model("deit_tiny_distilled_patch16_224", **TINY), seed=seeded(0)
    ).eval()


@pytest.fixture(params=["official.pth", "bare.pth", "trainer.pth", "timm.safetensors"])
def saved(request, source, tmp_path):
    path, state = tmp_path / request.param, source.state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        wrapped = {"bare": state, "official": {"model": state}}
        trainer = {"state_dict": state, "epoch": 3, "metric": 0.5}
        torch.save(wrapped.get(path.stem, trainer), path)
    return path


def test_every_container_loads(saved, source):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(build(checkpoint=saved)(x), source(x))


CAIT = {"depth": 1, "depth_token_only": 1, "img_size": 64, "num_classes": 11}


def test_caits_official_names_and_another_resolution(tmp_path):
    """A "module." before every name; no row of the positions is the class token's."""
    source = randomize(timm.create_model("cait_xxs24_224", **CAIT)).eval()
    state = {f"module.{name}": t for name, t in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "cait.pth")
    options = CAIT | {"checkpoint": tmp_path / "cait.pth", "backend": "torch"}
    model = deit_fast.create_model("cait_xxs24_224", **options).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(model(x), source(x))
    other = deit_fast.create_model("cait_xxs24_224", **options | {"img_size": 96})
    expected = resize_pos_embed(source.pos_embed, (4, 4), (6, 6), prefix=0)
    assert_close(other.pos_embed, expected)


@pytest.fixture
def path(source, tmp_path):
    torch.save({"model": source.state_dict()}, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_other_resolution_is_resized_as_in_the_paper(path, source):
    """Bicubic without antialiasing, prefix rows kept; downsampling shows the difference."""
    model = build(checkpoint=path, img_size=(32, 48))
    grid = source.pos_embed[:, 2:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (2, 3), mode="bicubic", align_corners=False)
    assert_close(model.pos_embed[:, 2:], expected.flatten(2).transpose(1, 2))
    assert_equal(model.pos_embed[:, :2], source.pos_embed[:, :2])
    timms = timm.layers.resample_abs_pos_embed(source.pos_embed, (2, 3), (4, 4), 2)
    assert_differ(model.pos_embed, timms)


def test_bicubic_keeps_the_norms_where_bilinear_does_not():
    seed(0)
    pos = torch.randn(1, 2 + 14 * 14, 192)
    got = resize_pos_embed(pos, (14, 14), (24, 24), 2)[:, 2:]
    norms = pos[:, 2:].norm(dim=2).mean()
    grid = pos[:, 2:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    bilinear = torch.nn.functional.interpolate(grid, (24, 24), mode="bilinear").norm(dim=1).mean()
    assert got.norm(dim=2).mean() > 0.8 * norms
    assert bilinear < 0.75 * norms
    assert resize_pos_embed(pos, (14, 14), (14, 14), 2) is pos


def test_pretrained_at_another_resolution_is_resized_the_same_way(path, source):
    kwargs = {k: v for k, v in TINY.items() if k != "img_size"}
    overlay = {"pretrained_cfg_overlay": {"file": str(path), "num_classes": 11}}
    native = randomize(
        timm.create_model("deit_tiny_distilled_patch16_224", **kwargs), seed=seeded(0)
    )
    torch.save({"model": native.state_dict()}, path)
    model = deit_fast.deit_tiny_distilled(
        pretrained=True, backend="torch", img_size=(64, 96), **kwargs, **overlay
    )
    expected = resize_pos_embed(native.pos_embed, (14, 14), (4, 6), 2)
    assert_close(model.pos_embed, expected)
    assert_close(model.blocks[1].mlp.fc1.weight, native.blocks[1].mlp.fc1.weight)
    same = deit_fast.deit_tiny_distilled(pretrained=True, backend="torch", **kwargs, **overlay)
    assert_close(same.pos_embed, native.pos_embed)


def test_other_number_of_classes_initializes_the_heads(path, source):
    with pytest.warns(
        UserWarning, match=r"head.weight, head.bias, head_dist.weight, head_dist.bias"
    ):
        model = build(checkpoint=path, num_classes=5)
    assert model.head.weight.shape == (5, 64)
    assert_close(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    with pytest.warns(UserWarning, match="left out"):
        assert build(checkpoint=path, num_classes=0)(torch.randn(1, 3, 64, 64)).shape == (1, 64)


def test_every_problem_is_listed(source, tmp_path):
    state = source.state_dict()
    state["extra.weight"] = state.pop("norm.bias")
    state["blocks.0.attn.proj.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(ValueError) as error:
        build(checkpoint=tmp_path / "broken.pth")
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "  missing: norm.bias",
        "  unexpected: extra.weight",
        "  misshaped: blocks.0.attn.proj.weight (3, 3), expected (64, 64)",
    ]
    assert "broken.pth does not fit VisionTransformerDistilled" in lines[0]


@pytest.mark.parametrize("start", ["vit.", "deit.", ""])
def test_transformers_names_are_told_where_to_go(start, tmp_path):
    state = {
        f"{start}embeddings.cls_token": torch.zeros(1, 1, 64),
        "classifier.bias": torch.ones(3),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has transformers' names: deit_fast.from_pretrained.FOLD"):
        build(checkpoint=tmp_path / "pytorch_model.bin")


def test_a_grid_that_is_not_square_but_as_long_survives_a_round_trip(tmp_path):
    options = {"img_size": (32, 128)}  # 2 x 8 patches, as many as 4 x 4
    model = build(**options)
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    again = build(checkpoint=tmp_path / "wide.pth", **options)
    assert_equal(again.pos_embed, model.pos_embed)


def test_models_that_are_no_vision_transformer_load_too(tmp_path):
    options = {"backend": "torch", "depth": 1, "img_size": 64, "num_classes": 5}
    model = deit_fast.create_model("cait_xxs24_224", **options)
    torch.save(model.state_dict(), tmp_path / "cait.pth")
    again = deit_fast.create_model("cait_xxs24_224", checkpoint=tmp_path / "cait.pth", **options)
    assert_equal(again.pos_embed, model.pos_embed)


def test_a_distilled_checkpoint_does_not_fit_a_plain_model(path):
    with pytest.raises(ValueError, match="unexpected: dist_token"):
        deit_fast.create_model("deit_tiny", checkpoint=path, backend="torch", **TINY)


def test_bad_options_are_named(path):
    with pytest.raises(ValueError, match="pretrained and checkpoint"):
        build(pretrained=True, checkpoint=path)
    with pytest.raises(ValueError, match="heads: 'both'"):
        build(heads="both")
    with pytest.raises(ValueError, match="VisionTransformer has one head"):
        deit_fast.create_model("deit_tiny", heads="distill", **TINY)
    assert tiny_pair()[1].heads == "joint" and build(heads="distill").heads == "distill"


# Names that wrappers put in front


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return model


def inside(*names):
    """As a module that holds the model under this name, around another, and so on."""

    def wrap(model):
        for name in names:
            model = nn.ModuleDict({name: model})
        return model

    return wrap


# torch.nn.DataParallel gives the names of DistributedDataParallel, without processes
WRAPPERS = {
    "parallel": nn.DataParallel,
    "compiled": torch.compile,
    "parallel, compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "compiled, parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "Lightning": inside("model"),
    "Lightning, compiled": lambda model: inside("model")(torch.compile(model)),
    "parallel twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
    "teacher": inside("backbone", "teacher"),
    "all": inside("backbone", "_orig_mod", "student", "model", "module", "_orig_mod"),
    "compiled blocks": compiled_blocks,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_wrappers_put_before_names_is_left_out(wrapper, source, tmp_path):
    expected = source.state_dict()
    state = WRAPPERS[wrapper](source).state_dict()
    assert not state.keys() & expected.keys() or wrapper == "compiled blocks"
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    safetensors.torch.save_file(dict(state), tmp_path / "wrapped.safetensors")
    for path in tmp_path.iterdir():
        got = build(checkpoint=path).state_dict()
        for name in expected:
            assert_equal(got[name], expected[name], name)


def test_what_only_some_names_begin_with_is_not_left_out():
    """Nor is a name of which nothing would be left."""
    for names in (["model", "teacher"], ["modules.a", "backbones.b"], ["x.model.a", "x.module.b"]):
        state = {name: torch.zeros(1) for name in names}
        assert read._unwrapped(state) == ("", state, {})
    clash = {"a": torch.zeros(1), "_orig_mod.a": torch.ones(1)}
    assert read._unwrapped(clash) == ("", clash, {})
    own = {"backbone.head.weight": torch.zeros(1), "head.weight": torch.ones(1)}
    assert read._unwrapped(own) == ("", own, {"backbone": 1, "head": 1})


@pytest.mark.slow
def test_no_model_of_timms_has_such_names():
    """One of each family that has modules of ours."""
    families = ("vision_transformer", "deit", "cait", "tiny_vit")
    models = [name for module in families for name in timm.list_models(module=module)]
    named = {"_".join(name.split("_")[:2]): name for name in models}
    assert len(named) > 20
    for name in named.values():
        with torch.device("meta"):
            state = timm.create_model(name).state_dict()
        assert read._unwrapped(state) == ("", state, {}), name
        assert not [k for k in state if k.startswith(PRETRAINING)], name


def test_a_common_name_of_another_kind_is_a_misfit_with_a_hint(source, tmp_path):
    torch.save({"state_dict": inside("net")(source).state_dict()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"\n  all names begin with net.: a checkpoint_key ending"):
        build(checkpoint=tmp_path / "a.ckpt")
    model = build(checkpoint=tmp_path / "a.ckpt", checkpoint_key="state_dict.net")
    assert_equal(model.norm.weight, source.norm.weight)
