"""Hooks on modules of an accelerated model see what those of timm's model see."""

import copy

import pytest
import torch
from checking import (
    assert_as_accurate,
    assert_close,
    assert_differ,
    assert_equal,
    assert_gradients_close,
)
from modelling import (
    gradients,
    hooked,
    images,
    tiny_pair,
)
from small_models import small_models, small_models_that_ran, unfused, warnings_of
from tiers import slow
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from deit_fast import layers
from deit_fast.layers._fusion import FUSED

BACKENDS = ["torch", slow("triton")]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of modules that are not fused


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", ["deit", "cait", "tiny_vit"])
def test_hooks_on_all_modules_see_what_timms_see(family, backend, grad, device):
    *pair, x = small_models(family, device, backend)
    found = []
    for model in pair:
        seen = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, a, y, n=name, s=seen: s.append((n, y)))
        with torch.set_grad_enabled(grad):
            model(x)
        found.append(seen)
    expected, got = found
    assert [name for name, _ in got] == [name for name, _ in expected]
    assert {"deit": 55, "cait": 63, "tiny_vit": 54}[family] <= len(expected)
    for (name, a), (_, b) in zip(expected, got, strict=True):
        assert_close(b, a, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    ["norm1", "attn.qkv", "attn.proj_drop", "ls1", "drop_path1", "mlp", "mlp.act", "mlp.fc2"],
)
def test_a_hook_and_its_block_alone(name, backend, device):
    """Called once a forward, warned about once; the other block stays fused; removed, it has no
    effect."""
    reference, fast, x = small_models("deit", device, backend)
    with torch.no_grad():
        before, expected = fast(x), reference(x)
        seen, inner = [], fast.blocks[0].get_submodule(name)
        hook = inner.register_forward_hook(lambda m, a, y: seen.append(y))
        got, words = warnings_of(fast, x)
        assert_close(got, expected)
        assert len(seen) == 1 and len(words) == 1
        assert f"blocks.0: {name} has a forward hook: " in words[0]
        assert list(unfused(fast)) == ["blocks.0"]
        assert fast.blocks[1].plan(x) is FUSED
        assert warnings_of(fast, x)[1] == [] and len(seen) == 2
        hook.remove()
        assert_equal(fast(x), before)
        assert unfused(fast) == {} and len(seen) == 2
        # for a copy there is a warning again
        twin = copy.deepcopy(fast)
        twin.blocks[0].get_submodule(name).register_forward_hook(lambda m, a, y: None)
        assert len(warnings_of(twin, x)[1]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["patch_embed", "pos_drop", "blocks", "blocks.1", "norm", "head_drop", "head_dist"]
)
def test_a_hook_on_a_part_of_the_model(name, backend, device):
    """It sees what timm's sees, all tokens too, and no block is unfused by it."""
    reference, fast, x = small_models("deit", device, backend)
    found = []
    for model in (reference, fast):
        seen = []
        model.get_submodule(name).register_forward_hook(lambda m, a, y, s=seen: s.append(y))
        with torch.no_grad():
            model(x)
        found.append(seen)
    assert len(found[0]) == len(found[1]) > 0
    for expected, got in zip(*found, strict=True):
        assert_close(got, expected)
    assert unfused(fast) == {}


def test_uint8_images_with_a_hook_and_no_class_token(device):
    """The patch embedding is called, with what it would get in timm."""
    _, fast = tiny_pair(distilled=False, class_token=False, global_pool="avg")
    x = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, device=device)
    fast, seen = fast.to(device), []
    with torch.no_grad():
        expected = fast(x)
        fast.patch_embed.register_forward_hook(lambda m, a, y: seen.append(a[0]))
        assert_close(fast(x), expected)
    assert seen[0].shape == (2, 3, 64, 64)


KINDS = {
    "register_forward_hook": (lambda m, a, y: 2 * y, {}),
    "register_forward_pre_hook": (lambda m, a: (a[0].roll(1, -1),), {}),
    "register_forward_hook, kwargs": (lambda m, a, k, y: 2 * y, {"with_kwargs": True}),
    "register_full_backward_hook": (lambda m, into, out: (2 * into[0],), {}),
    "register_full_backward_pre_hook": (lambda m, out: (2 * out[0],), {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["blocks.1.norm2", slow("blocks.0.attn.proj"), "norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_change_what_they_see(kind, name, backend, device):
    reference, fast, x = small_models("deit", device, backend)
    method, (hook, options) = kind.split(",")[0], KINDS[kind]
    plain = gradients(copy.deepcopy(reference), x)
    for model in (reference, fast):
        getattr(model.get_submodule(name), method)(hook, **options)
    expected, got = gradients(reference, x), gradients(fast, x)
    assert_gradients_close(got, expected)
    assert_differ(expected["patch_embed.proj.weight"], plain["patch_embed.proj.weight"])


def test_hooks_on_all_modules_at_once(device):
    """PyTorch's global hooks: what they see of timm's they see here."""
    reference, fast, x = small_models("deit", device)
    found = []
    for model in (reference, fast):
        names, seen = {m: n for n, m in model.named_modules()}, []
        hook = register_module_forward_hook(
            lambda m, a, y, n=names, s=seen: s.append((n[m], y)) if m in n else None
        )
        try:
            with torch.no_grad():
                model(x)
        finally:
            hook.remove()
        found.append(seen)
    expected, got = found
    assert len(expected) > 50 and [n for n, _ in got] == [n for n, _ in expected]
    with torch.no_grad():
        fast(x)
    assert unfused(fast) == {}


@pytest.mark.parametrize("name", ["fc_norm", "norm_pre", "patch_drop", "attn_pool"])
def test_hooks_on_what_does_nothing(name):
    _, fast, x = small_models_that_ran("vit")
    seen, module = [], getattr(fast, name)
    if module is None:
        return
    module.register_forward_hook(lambda m, a, y: seen.append(1))
    with torch.no_grad():
        fast(x)
    assert seen == [1]


def test_a_global_hook_after_a_count():
    """As many hooks on all modules as before, and others."""
    reference, fast, x = small_models_that_ran("vit")
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


MODULES = ("patch_embed", "blocks.0", "blocks.1", "norm", "head_drop", "head", "head_dist")


@pytest.mark.parametrize("name", MODULES)
def test_hooks_on_the_models_own_modules_fire(name):
    expected, got = hooked(*tiny_pair(), name)
    if name != "head_drop" or expected is not None:  # some timm's distilled head has no dropout
        assert_close(got, expected)


@pytest.mark.slow
def test_hooks_on_blocks_fire_between_row_stats(device):
    reference, fast = (m.to(device) for m in tiny_pair("triton", depth=3))
    x = images(reference, batch=32).to(device).half()
    fast.half(), reference.half()
    for model in (fast, reference):
        model.blocks[1].register_forward_hook(lambda module, args, out: out * 1.5)
    exact = copy.deepcopy(reference).double()
    with torch.no_grad():
        assert_as_accurate(fast(x), reference(x), exact(x.double()))


@pytest.mark.parametrize("grad", [False, True])
def test_hooks_on_the_container_of_blocks_fire_in_forward_features(grad):
    _, fast = tiny_pair()
    fired = []
    fast.blocks.register_forward_hook(lambda *args: fired.append(1))
    with torch.set_grad_enabled(grad):
        fast.forward_features(images(fast))
    assert fired == [1]


def test_a_block_compiled_by_itself_is_called():
    _, fast = tiny_pair(depth=3)
    calls = []
    fast.blocks[1]._compiled_call_impl = lambda x: calls.append(1) or x
    with torch.no_grad():
        fast(images(fast))
    assert calls == [1]


def test_fully_sharded_blocks_are_pruned_still():
    """FSDP2's hooks gather parameters and read no tokens: the last block runs for the prefix."""
    from torch.distributed.fsdp import FSDPModule

    _, fast = tiny_pair()
    last = fast.blocks[-1]
    before = fast(images(fast))
    kind = type("FSDPBlock", (FSDPModule, layers.Block), {})

    def gathers(module, args, output):
        seen.append(output.shape[1])

    gathers.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    last.__class__, seen = kind, []
    last.register_forward_hook(gathers)
    assert_equal(fast(images(fast)), before)
    assert seen == [2]
    last.register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))
    assert_close(fast(images(fast)), before)
    assert seen == [2, 18, 18]
