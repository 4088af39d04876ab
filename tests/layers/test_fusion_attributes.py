"""Changes to attributes, methods and classes after `accelerate`, against timm's with the same."""

import pytest
import timm
import timm.models.cait as timm_cait
import timm.models.vision_transformer as timm_vit
import torch
from checking import assert_close, assert_differ, assert_gradients_close, seed
from modelling import gradients
from small_models import small_models_that_ran, unfused, warnings_of
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of modules that are not fused


def assert_same(reference, fast, x, train=True):
    with torch.no_grad():
        assert_close(fast(x), reference(x))
        assert_close(fast.forward_features(x), reference.forward_features(x))
    if train:
        for model in (reference, fast):
            model.train()
        assert_gradients_close(gradients(fast, x), gradients(reference, x))


def strided(model):
    """The way of extractors of dense features."""
    model.patch_embed.proj.stride = (8, 8)
    model.patch_embed.strict_img_size = False
    weight = model.pos_embed.detach()
    model._pos_embed = lambda x: x + weight[:, :1]


def dilated(model):
    model.patch_embed.proj.dilation, model.patch_embed.proj.padding = (2, 2), (8, 8)


def convolution(model):
    return model.stages[1].downsample.conv2


def without_statistics(model):
    bn = convolution(model).bn
    bn.track_running_stats, bn.running_mean, bn.running_var = False, None, None


def blocks_twice(model):
    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    model.blocks = Twice(*model.blocks)


def compiled_blocks(model):
    model.blocks = torch.compile(model.blocks, backend="eager")


def method(name, of_class):
    """Like the one that is there, but for its result."""

    def change(model):
        base = timm_cait.Cait if isinstance(model, timm_cait.Cait) else timm_vit.VisionTransformer
        original = getattr(base, name)

        def changed(self, *args, **kwargs):
            return original(self, *args, **kwargs).roll(1, -1)

        if of_class:
            model.__class__ = type("Mine", (type(model),), {name: changed})
        else:
            setattr(model, name, changed.__get__(model))

    return change


def dropping_by_the_attentions_mode(model):
    for block in model.blocks:
        block.attn.attn_drop.p = 0.3
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


CHANGES = [
    ("vit", strided), ("vit", dilated), ("vit", blocks_twice), ("cait", blocks_twice),
    ("vit", compiled_blocks),
    *[("vit", method(name, True)) for name in ("forward_features", "_pos_embed", "forward_head")],
    *[("vit", method(name, False)) for name in ("_pos_embed", "forward_head", "pool")],
    *[("cait", method(name, of)) for name in ("forward_cls", "forward_head") for of in (0, 1)],
]  # fmt: skip


@pytest.mark.parametrize(
    "family, change", CHANGES, ids=[f"{f}-{c.__name__}{i}" for i, (f, c) in enumerate(CHANGES)]
)
def test_changes_of_a_model(family, change):
    reference, fast, x = small_models_that_ran(family)
    before = reference(x)
    for model in (reference, fast):
        change(model)
    assert_differ(reference(x), before) if change is not compiled_blocks else None
    assert_same(reference, fast, x)


@pytest.mark.parametrize("what", ["dilation", "bias", "padding_mode", "statistics", "method"])
def test_changes_of_tiny_vit(what):
    reference, fast, x = small_models_that_ran("tiny_vit")
    before = reference(x)
    for model in (reference, fast):
        conv = convolution(model).conv
        if what == "dilation":
            conv.dilation = conv.padding = (2, 2)
        elif what == "bias":
            conv.bias = nn.Parameter(torch.arange(64.0))
        elif what == "padding_mode":
            conv.padding_mode = "reflect"
        elif what == "statistics":
            without_statistics(model)
        else:
            attn = model.stages[1].blocks[0].attn
            attn.get_attention_biases = lambda device: torch.eye(16) * 9
    with torch.no_grad():
        assert_differ(reference(x), before)
        assert_close(fast(x), reference(x))


def test_the_attentions_mode_alone():
    """Which decides whether PyTorch's fused attention drops."""
    reference, fast, x = small_models_that_ran("vit")
    for model in (reference, fast):
        for block in model.blocks:
            block.attn.attn_drop.p = 0.3
        before = model(x)
        for block in model.blocks:
            block.attn.training = True
    found = []
    for model in (reference, fast):
        seed(4)
        found.append(model(x))
    assert_differ(found[0], before)
    assert_close(found[1], found[0])


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_of_attention_in_timms_mode(fused):
    """timm's fused attention drops in the attention's mode, the plain one in the dropout's."""
    reference, fast, x = small_models_that_ran("vit")
    for model in (reference, fast):
        for block in model.blocks:
            block.attn.fused_attn = fused
        dropping_by_the_attentions_mode(model)
    assert_gradients_close(gradients(fast, x), gradients(reference, x))
    assert bool(unfused(fast)) == fused


@pytest.mark.parametrize("kind", [timm.layers.Attention, timm.layers.Mlp, timm_vit.Block, nn.GELU])
def test_a_patched_class_of_timms(kind, monkeypatch):
    """After `accelerate`; and put back."""
    reference, fast, x = small_models_that_ran("vit")
    original, before = kind.forward, reference(x)

    def doubled(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", doubled)
        got, words = warnings_of(fast, x)
        assert_close(got, reference(x))
        assert_differ(got, before)
        assert "whose forward was replaced" in words[0] or "was replaced" in words[0]
        assert_gradients_close(gradients(fast, x), gradients(reference, x))
    assert unfused(fast) == {}
    assert_close(fast(x), before)


@pytest.mark.parametrize("name", ["forward_features", "_pos_embed", "forward"])
def test_a_patched_model_class_of_timms(name, monkeypatch):
    reference, fast, x = small_models_that_ran("vit")
    original, before = getattr(timm_vit.VisionTransformer, name), reference(x)

    def changed(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs).roll(1, -1)

    monkeypatch.setattr(timm_vit.VisionTransformer, name, changed)
    assert_differ(reference(x), before)
    assert_close(fast(x), reference(x))
