"""What people do to a model after `accelerate`, against timm's with the same done to it."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from checking import (
    assert_as_accurate,
    assert_close,
    assert_differ,
    assert_equal,
    assert_gradients_close,
    seed,
)
from modelling import SMALL_CAIT, SMALL_TINY_VIT, gradients, images, pair, tiny_pair
from tiers import slow
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

import deit_fast
from deit_fast import layers
from deit_fast.layers import _bypass

BACKENDS = ["torch", slow("triton")]
FAMILIES = {
    "deit": lambda backend: tiny_pair(backend, init_values=1e-2, drop_path_rate=0.1),
    "cait": lambda backend: pair("cait_xxs24_224", backend, **SMALL_CAIT),
    "tiny_vit": lambda backend: pair("tiny_vit_5m_224", backend, **SMALL_TINY_VIT),
}


@pytest.fixture(autouse=True)
def quiet():
    """Warnings are what some tests are about; the others need not show them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def models(device, backend="torch", family="deit"):
    made = [m.to(device) for m in FAMILIES[family](backend)]
    size = {"deit": 64, "cait": 32, "tiny_vit": 64}[family]
    seed(1)
    return *made, torch.randn(2, 3, size, size, device=device)


def said(function, *args):
    """What it returned, and the UserWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(w.message) for w in caught if w.category is UserWarning]


def unfused(model):
    return {left.name: left.reason for left in deit_fast.report(model).unfused}


# Hooks


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_all_modules_see_what_timms_see(family, backend, grad, device):
    *pair, x = models(device, backend, family)
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
    """Seen once in each call, said once; the other block stays fused; taken away, nothing is
    left."""
    reference, fast, x = models(device, backend)
    with torch.no_grad():
        before, expected = fast(x), reference(x)
        seen, inner = [], fast.blocks[0].get_submodule(name)
        hook = inner.register_forward_hook(lambda m, a, y: seen.append(y))
        got, words = said(fast, x)
        assert_close(got, expected)
        assert len(seen) == 1 and len(words) == 1
        assert f"blocks.0: {name} has a forward hook: " in words[0]
        assert list(unfused(fast)) == ["blocks.0"]
        assert fast.blocks[1].plan(x) is _bypass.FUSED
        assert said(fast, x)[1] == [] and len(seen) == 2
        hook.remove()
        assert_equal(fast(x), before)
        assert unfused(fast) == {} and len(seen) == 2
        # of a copy it is said again
        twin = copy.deepcopy(fast)
        twin.blocks[0].get_submodule(name).register_forward_hook(lambda m, a, y: None)
        assert len(said(twin, x)[1]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["patch_embed", "pos_drop", "blocks", "blocks.1", "norm", "head_drop", "head_dist"]
)
def test_a_hook_on_a_part_of_the_model(name, backend, device):
    """It sees what timm's sees, all tokens too, and no block is unfused by it."""
    reference, fast, x = models(device, backend)
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


def test_bytes_beside_a_hook_without_a_class_token(device):
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
    reference, fast, x = models(device, backend)
    method, (hook, options) = kind.split(",")[0], KINDS[kind]
    plain = gradients(copy.deepcopy(reference), x)
    for model in (reference, fast):
        getattr(model.get_submodule(name), method)(hook, **options)
    expected, got = gradients(reference, x), gradients(fast, x)
    assert_gradients_close(got, expected)
    assert_differ(expected["patch_embed.proj.weight"], plain["patch_embed.proj.weight"])


def test_hooks_on_all_modules_at_once(device):
    """PyTorch's global hooks: what they see of timm's they see here."""
    reference, fast, x = models(device)
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


def test_hook_dictionaries_that_were_replaced(device):
    """A common way to remove hooks leaves other dictionaries than those seen before."""
    _, fast, x = models(device)
    fast(x)
    act, seen = fast.blocks[0].mlp.act, []
    act._forward_hooks = type(act._forward_hooks)()
    fast(x)
    act.register_forward_hook(lambda m, a, y: seen.append(1))
    fast(x)
    assert seen == [1]


# What a layer is and does


def rollout(model):
    """The way of attention visualisers."""
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, a, y: model.maps.append(y))


def patched(model):
    attn = model.blocks[0].attn
    attn.forward = lambda x, **_: 2 * type(attn).forward(attn, x)


def compiled(model):
    model.blocks[1].mlp.compile(backend="eager")


def pruned(model):
    prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    prune.l1_unstructured(model.blocks[1].mlp.fc2, "weight", 0.5)


def pruned_norm(model):
    prune.l1_unstructured(model.blocks[1].norm1, "weight", 0.5)


def spectral(model):
    seed(5)  # its power iteration
    parametrizations.spectral_norm(model.blocks[1].mlp.fc1)


class Negated(nn.GELU):
    def forward(self, x):
        return -super().forward(x)


def other_class(model):
    model.blocks[1].mlp.act.__class__ = Negated


def plainly_scaled(model):
    model.blocks[0].attn.fused_attn, model.blocks[0].attn.scale = False, 0.5


def set_attribute(path, value):
    def change(model):
        seed(7)
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value() if callable(value) else value)

    return change


class Doubled(nn.Module):
    def forward(self, x, **_):
        return 2 * x


CHANGES = {
    "patched forward": patched,
    "compiled part": compiled,
    "pruning": pruned,
    "pruned norm": pruned_norm,
    "spectral norm": spectral,
    "class of a layer": other_class,
    "q_norm": set_attribute("blocks.0.attn.q_norm", lambda: nn.LayerNorm(32)),
    "gate": set_attribute("blocks.0.attn.gate", lambda: nn.Linear(64, 64)),
    "attn": set_attribute("blocks.0.attn", Doubled),
    "last attn": set_attribute("blocks.1.attn", Doubled),
    "mlp": set_attribute("blocks.0.mlp", Doubled),
    "act": set_attribute("blocks.1.mlp.act", nn.ReLU),
    "tanh": set_attribute("blocks.1.mlp.act.approximate", "tanh"),
    "mlp norm": set_attribute("blocks.1.mlp.norm", lambda: nn.LayerNorm(256)),
    "norm": set_attribute("blocks.0.norm1", lambda: timm.layers.RmsNorm(64)),
    "norm of another eps": set_attribute("blocks.0.norm1", lambda: nn.LayerNorm(64, eps=0.1)),
    "eps": set_attribute("blocks.0.norm1.eps", 0.1),
    "scale": set_attribute("blocks.0.attn.scale", 0.5),
    "scale of plain attention": plainly_scaled,
    "drop_path": set_attribute("blocks.1.drop_path1", Doubled),
    "layer_scale": set_attribute("blocks.1.ls2", Doubled),
    "dropout": set_attribute("blocks.0.mlp.drop1", nn.Identity),
    "fc1": set_attribute("blocks.1.mlp.fc1", lambda: nn.Linear(64, 256, bias=False)),
    "no bias": set_attribute("blocks.1.mlp.fc1.bias", None),
    "head": set_attribute("head", lambda: nn.Sequential(nn.Linear(64, 9), nn.Linear(9, 11))),
    "head dropout": set_attribute("head_drop", Doubled),
    "final norm": set_attribute("norm", lambda: timm.layers.RmsNorm(64)),
    "patch embedding": set_attribute("patch_embed.norm", lambda: nn.LayerNorm(64)),
    "forward_features": set_attribute(
        "forward_features", lambda: lambda x, **_: x.new_ones(len(x), 18, 64)
    ),
    "last block": set_attribute("blocks.1", Doubled),
}
# these only change what a fused operation reads
STILL_FUSED = {
    "eps",
    "scale",
    "scale of plain attention",
    "norm of another eps",
    "no bias",
    "dropout",
    "head",
    "fc1",
}
STILL_FUSED |= {"head dropout", "final norm", "patch embedding", "forward_features", "last block"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes(change, backend, device):
    """The result and the gradients are timm's, before and after; where a block is not fused any
    more it is said."""
    reference, fast, x = models(device, backend)
    with torch.no_grad():
        before, _ = reference(x), fast(x)
    for model in (reference, fast):
        CHANGES[change](model)
        model.to(device)
    with torch.no_grad():
        expected, (got, words) = reference(x), said(fast, x)
    assert_close(got, expected)
    if change not in ("compiled part", "dropout", "tanh", "scale"):  # timm's fused one has no scale
        assert_differ(expected, before)
    if change == "norm of another eps":  # PyTorch's own module came in, and is called
        assert "norm1" in unfused(fast)["blocks.0"]
    elif change == "patch embedding":
        assert words[0].startswith("patch_embed: has a norm: ") and len(words) == 1
    elif change in STILL_FUSED:
        assert words == [] and not any("blocks" in name for name in unfused(fast))
    else:
        assert words and set(unfused(fast)) <= {"blocks.0", "blocks.1"} and unfused(fast)
    assert_gradients_close(gradients(fast, x), gradients(reference, x))
    if change in ("forward_features", "pruning", "pruned norm"):  # not even timm's can be copied
        return
    other = copy.deepcopy(fast)
    with torch.no_grad():
        assert_close(other(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family, path, value", [
    ("cait", "blocks.0.attn.proj_l", lambda: nn.Linear(2, 2, bias=False)),
    ("cait", "blocks.0.attn.proj_w", Doubled),
    ("cait", "blocks.1.mlp.act", nn.ReLU),
    ("cait", "blocks.1.norm2", lambda: timm.layers.RmsNorm(96)),
    ("cait", "blocks_token_only.0.attn", lambda: Picked()),
    ("cait", "blocks_token_only.0.attn.v", lambda: nn.Linear(96, 96)),
    ("cait", "blocks_token_only.0.drop_path", Doubled),
    ("tiny_vit", "stages.1.blocks.0.attn.norm", lambda: timm.layers.RmsNorm(64)),
    ("tiny_vit", "stages.1.blocks.0.mlp.act", nn.ReLU),
    ("tiny_vit", "stages.1.blocks.0.local_conv", Doubled),
    ("tiny_vit", "stages.0.blocks.0.act2", nn.ReLU),
])  # fmt: skip
def test_changes_of_relatives(family, path, value, backend, device):
    *pair, x = models(device, backend, family)
    for model in pair:
        set_attribute(path, value)(model)
        model.to(device)
    reference, fast = pair
    with torch.no_grad():
        assert_close(fast(x), reference(x))
    for model in pair:
        model.train()  # in eval() timm's TinyViT keeps biases that no gradient reaches
    assert_gradients_close(gradients(fast, x), gradients(reference, x))


class Picked(nn.Module):
    """In the place of attention over classes: the first token."""

    def forward(self, x):
        return x[:, :1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"])
def test_dropout_set_afterwards(name, backend, device):
    """In train() with timm's own numbers; in eval() fused."""
    reference, fast, x = models(device, backend)
    for model in (reference, fast):
        model.blocks[0].get_submodule(name).p = 0.5
        model.blocks[1].get_submodule(name).p = 0.25
    assert unfused(fast) == {}
    assert_close(fast(x), reference(x))
    assert unfused(fast.train()) == {
        f"blocks.{i}": f"{name} drops numbers: runs timm's own forward, unfused" for i in range(2)
    }
    assert_gradients_close(gradients(fast, x), gradients(reference.train(), x))
    assert unfused(fast.eval()) == {}


def test_dropout_given_to_timm(device):
    """A model made with dropout is swapped: it drops in training alone."""
    options = {"attn_drop_rate": 0.2, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1}
    reference, fast = (m.to(device) for m in tiny_pair("torch", **options))
    x = images(reference).to(device)
    report = deit_fast.accelerate(fast, "torch")
    assert report.left == [] and report.unfused == []
    for model in (reference, fast):
        model.train()
    report = deit_fast.accelerate(fast, "torch")
    assert [left.name for left in report.unfused] == ["blocks.0", "blocks.1"]
    assert "unfused: blocks.0 (Block): attn.attn_drop drops numbers" in str(report)
    got, words = said(gradients, fast, x)
    assert words == []  # the report has said it
    assert_gradients_close(got, gradients(reference, x))


def test_attention_rollout_as_it_is_done(device):
    reference, fast, x = models(device)
    for model in (reference, fast):
        model.maps = []
        rollout(model)
        with torch.no_grad():
            model(x)
    assert len(fast.maps) == 2
    for a, b in zip(reference.maps, fast.maps, strict=True):
        assert_close(b, a)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_around_a_linear_that_is_called_the_rest_is_fused(backend, device, monkeypatch):
    """Adapters on qkv and fc1, and an fc2: none of timm's forwards runs, dropout and stochastic
    depth draw in its order."""
    reference, fast, x = models(device, backend)

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, base.out_features)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.base(x) + self.drop(self.down(x))

    for model in (reference, fast):
        seed(3)
        for block in model.blocks:
            block.attn.qkv, block.mlp.fc1 = Adapter(block.attn.qkv), Adapter(block.mlp.fc1)
        model.blocks[1].mlp.fc2 = Adapter(model.blocks[1].mlp.fc2)
        model.to(device).eval()
    _, words = said(fast, x)
    words.sort()
    assert len(words) == 2 and words[0].startswith("blocks.0: attn.qkv is a test_bypass.")
    assert "mlp.fc1 is a test_bypass." in words[0] and words[0].endswith("the rest is fused")
    expected, trained = reference(x), gradients(reference.train(), x)
    for kind in (timm.models.vision_transformer.Block, timm.layers.Attention, timm.layers.Mlp):
        monkeypatch.setattr(kind, "forward", None)
    assert_close(fast(x), expected)
    assert_gradients_close(gradients(fast.train(), x), trained)
    # taken out again
    for block in fast.eval().blocks:
        block.attn.qkv, block.mlp.fc1 = block.attn.qkv.base, block.mlp.fc1.base
    fast.blocks[1].mlp.fc2 = fast.blocks[1].mlp.fc2.base
    assert unfused(fast) == {} and fast.blocks[0].plan(x) is _bypass.FUSED


def test_weights_that_are_not_plain_numbers(device):
    """As torchao keeps them, in place: the Linear is called."""
    _, fast, x = models(device)
    expected = fast(x)

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner, *_):
            return Wrapped(inner["inner"])

        @classmethod
        def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
            bare = [a.inner if isinstance(a, Wrapped) else a for a in args]
            return op(*bare, **(kwargs or {}))

    fc1 = fast.blocks[0].mlp.fc1
    fc1._parameters["weight"] = Wrapped(fc1.weight.detach())
    with torch.no_grad():
        got, words = said(fast, x)
    assert_close(got, expected)
    assert len(words) == 1 and "mlp.fc1 is a Linear whose weight is a test_bypass." in words[0]


def test_a_layer_scale_and_drop_path_of_timms_kind_stay_fused(device):
    reference, fast, x = models(device)
    for model in (reference, fast):
        model.blocks[0].ls1 = nn.Identity()
        model.blocks[0].drop_path2 = timm.layers.DropPath(0.3)
        model.train()
    assert unfused(fast) == {}
    assert_gradients_close(gradients(fast, x), gradients(reference, x))


# Whole models


def test_report_changes_nothing_and_needs_an_accelerated_model():
    reference, fast = tiny_pair()
    with pytest.raises(ValueError, match="nothing in VisionTransformerDistilled is accelerated"):
        deit_fast.report(reference)
    before = deit_fast.report(fast)
    assert before.swapped["Block"] == ["blocks.0", "blocks.1"] and before.backend == "torch"
    assert before.unfused == [] == before.left
    fast.blocks[1].attn = timm.layers.Attention(64, 2)
    later = deit_fast.report(fast)
    assert [(left.name, left.kind) for left in later.left] == [("blocks.1.attn", "Attention")]
    assert "came in since" in later.left[0].reason
    assert unfused(fast)["blocks.1"].startswith("attn stays with timm")
    assert deit_fast.accelerate(fast, "torch").unfused == []


def test_the_check_of_the_last_time_is_nobody_elses(device):
    """Copies, pickles and replicas have parts of their own."""
    _, fast, x = models(device)
    expected = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert_equal(twin(x), expected)
    twin = copy.deepcopy(fast)
    twin.blocks[0].mlp.act = nn.ReLU()
    assert_differ(twin(x), expected)
    assert_equal(fast(x), expected)
    block = fast.blocks[0]
    replica = block._replicate_for_data_parallel()  # shares what was remembered
    replica._modules["mlp"] = Doubled()
    assert "mlp" in replica.plan(x).unfused and block.plan(x) is _bypass.FUSED


def test_replicas_of_data_parallel_stay_fused(device):
    """Their weights are tensors beside the parameters."""
    _, fast, x = models(device)

    def replicated(module):
        made = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else replicated(child)
        for name, p in module._parameters.items():
            made.__dict__[name] = p
        return made

    twin = replicated(fast)
    assert twin.blocks[0].plan(x) is _bypass.FUSED
    assert_equal(twin(x), fast(x))


@pytest.mark.parametrize("what", ["hook", "dropout", "replaced"])
def test_compiled_models_obey_too(what, device):
    """One graph; another one after the change, and no more."""
    reference, fast, x = models(device)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    # without the option PyTorch promises to see no later hook on any model
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        for _ in range(2):
            assert_close(compiled(x), reference(x))
        assert len(graphs) == 1
        for model in (reference, fast):
            if what == "hook":
                model.blocks[0].mlp.act.register_forward_hook(lambda m, a, y: 2 * y)
            elif what == "dropout":
                model.blocks[0].mlp.drop1.p = 1.0
                model.blocks[0].mlp.drop1.train()
            else:
                model.blocks[0].mlp.act = nn.ReLU()
        for _ in range(2):
            assert_close(compiled(x), reference(x))
        assert len(graphs) == 2


def test_eight_bits_obey_too(device):
    """Each layer quantises for itself where hooks look on; what has no meaning is refused by
    name."""
    reference, fast, x = models(device)
    deit_fast.quantize(fast, "int8")
    with torch.no_grad():
        before, exact = fast(x), reference(x)
        seen = []
        hook = fast.blocks[0].attn.qkv.register_forward_hook(lambda m, a, y: seen.append(y))
        got, words = said(fast, x)
        assert len(seen) == 1 and "blocks.0: attn.qkv has a forward hook" in words[0]
        assert_as_accurate(got, before, exact)
        fast.blocks[0].attn(torch.randn(2, 18, 64, device=device))
        assert len(seen) == 2
        hook.remove()
        assert_equal(fast(x), before)
        fast.blocks[1].mlp.act = nn.ReLU()
        assert_differ(fast(x), before)
        assert list(unfused(fast)) == ["blocks.1"]
    with pytest.raises(RuntimeError, match="quantized operations are for inference"):
        torch.func.grad(lambda x: fast(x).sum())(x)


def test_fully_sharded_blocks_are_pruned_still():
    """FSDP2's hooks gather parameters and look at no tokens: the last block runs for the prefix."""
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
