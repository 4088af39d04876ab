"""Changes to attributes, methods and classes after `accelerate`, against timm's with the same."""

import warnings

import pytest
import timm
import timm.models.cait as timm_cait
import timm.models.vision_transformer as timm_vit
import torch
from checking import assert_close, assert_differ, assert_gradients_close, seed
from modelling import SMALL_CAIT, SMALL_TINY_VIT, gradients, pair, tiny_pair
from test_bypass import said, unfused
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

FAMILIES = {
    "vit": lambda: tiny_pair(distilled=False),
    "distilled": lambda: tiny_pair(),
    "cait": lambda: pair("cait_xxs24_224", "torch", **SMALL_CAIT),
    "tiny_vit": lambda: pair("tiny_vit_5m_224", "torch", **SMALL_TINY_VIT),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def models(family):
    """Both have run before: what was seen then may be stale."""
    made = FAMILIES[family]()
    seed(1)
    x = torch.randn(2, 3, *[32 if family == "cait" else 64] * 2)
    with torch.no_grad():
        for model in made:
            model(x)
    return *made, x


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


def patched_then_marked(model):
    """As many entries as before, and another among them."""
    act = model.blocks[0].mlp.act
    del act.tag
    act.forward = lambda x: -x


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
    reference, fast, x = models(family)
    before = reference(x)
    for model in (reference, fast):
        change(model)
    assert_differ(reference(x), before) if change is not compiled_blocks else None
    assert_same(reference, fast, x)


@pytest.mark.parametrize("what", ["dilation", "bias", "padding_mode", "statistics", "method"])
def test_changes_of_tiny_vit(what):
    reference, fast, x = models("tiny_vit")
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
    reference, fast, x = models("vit")
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
    reference, fast, x = models("vit")
    for model in (reference, fast):
        for block in model.blocks:
            block.attn.fused_attn = fused
        dropping_by_the_attentions_mode(model)
    assert_gradients_close(gradients(fast, x), gradients(reference, x))
    assert bool(unfused(fast)) == fused


def test_a_forward_beside_a_mark_taken_away():
    reference, fast, x = models("vit")
    for model in (reference, fast):
        model.blocks[0].mlp.act.tag = 1
        model(x)
        patched_then_marked(model)
    assert_same(reference, fast, x)


@pytest.mark.parametrize("name", ["fc_norm", "norm_pre", "patch_drop", "attn_pool"])
def test_hooks_on_what_does_nothing(name):
    _, fast, x = models("vit")
    seen, module = [], getattr(fast, name)
    if module is None:
        return
    module.register_forward_hook(lambda m, a, y: seen.append(1))
    with torch.no_grad():
        fast(x)
    assert seen == [1]


def test_a_global_hook_after_a_count():
    """As many hooks on all modules as before, and others."""
    reference, fast, x = models("vit")
    with FlopCounterMode(display=False), torch.no_grad():
        fast(x)
    found = []
    for model in (reference, fast):
        seen = []
        hooks = [
            register_module_forward_hook(lambda m, a, y, s=seen: s.append(type(m).__name__))
            for _ in range(2)
        ]
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()
        found.append(seen.count("Linear"))
    assert found[0] == found[1] == 2 * (2 * 4 + 1)


@pytest.mark.parametrize("kind", [timm.layers.Attention, timm.layers.Mlp, timm_vit.Block, nn.GELU])
def test_a_patched_class_of_timms(kind, monkeypatch):
    """After the swap; and put back."""
    reference, fast, x = models("vit")
    original, before = kind.forward, reference(x)

    def doubled(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", doubled)
        got, words = said(fast, x)
        assert_close(got, reference(x))
        assert_differ(got, before)
        assert "whose forward was replaced" in words[0] or "was replaced" in words[0]
        assert_gradients_close(gradients(fast, x), gradients(reference, x))
    assert unfused(fast) == {}
    assert_close(fast(x), before)


@pytest.mark.parametrize("name", ["forward_features", "_pos_embed", "forward"])
def test_a_patched_model_class_of_timms(name, monkeypatch):
    reference, fast, x = models("vit")
    original, before = getattr(timm_vit.VisionTransformer, name), reference(x)

    def changed(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs).roll(1, -1)

    monkeypatch.setattr(timm_vit.VisionTransformer, name, changed)
    assert_differ(reference(x), before)
    assert_close(fast(x), reference(x))
