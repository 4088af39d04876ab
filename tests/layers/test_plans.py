"""Launch plans: the same bits as in Python, and Python wherever something differs."""

import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch
from planning import assert_equal, small, stepped
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import deit_fast
from deit_fast import kernels, layers
from deit_fast.kernels import _tuned
from deit_fast.layers import _plans
from deit_fast.layers._plans.calls import MOST_STALE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest_plugins = ["planning"]


@pytest.fixture
def inference(plans, device):
    """A model, a batch, and a call without gradients that is a plan."""
    model, x = small(device)
    with torch.no_grad():
        plans.warm(lambda: model(x))
        yield model, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inference(plans, device, dtype):
    model, x = small(device, dtype, depth=2)
    with torch.no_grad():
        plans.warm(lambda: model(x))
        for scale in (1, 3):
            with _plans.in_python():
                expected = plans.called(lambda scale=scale: model(scale * x), plan=False)
            assert_equal([plans.called(lambda scale=scale: model(scale * x))], [expected])


def test_a_kind_is_recorded_when_it_comes_again(plans, device):
    model, x = small(device)
    with torch.no_grad():
        for batch, expected in ((2, False), (1, False), (2, False), (1, False), (2, True)):
            plans.called(lambda batch=batch: model(x[:batch]), plan=expected)
        plans.called(lambda: model(x[:1]))


def replaced(model):
    model.blocks[0].norm1 = copy.deepcopy(model.blocks[0].norm1)
    with torch.no_grad():
        model.blocks[0].norm1.weight.mul_(2)


def weight_replaced(model):
    model.head.weight = nn.Parameter(2 * model.head.weight)


def hooked(model):
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: 2 * out)


def other_class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.head.__class__ = Doubled


def own_forward(model):
    model.head.forward = lambda x: x[:, :11] * 0


def hook_everywhere(model):
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    model.undo = hook.remove


def other_parameters(model):
    model.head._parameters = {
        name: nn.Parameter(2 * p) for name, p in model.head._parameters.items()
    }


def timms_method(model):
    cls = timm.models.vision_transformer.VisionTransformer
    before = cls.pool
    cls.pool = lambda self, x, pool_type=None: 2 * before(self, x, pool_type)
    model.undo = lambda: setattr(cls, "pool", before)


CHANGES = {
    "other dictionary of parameters": other_parameters,
    "method of timm's class": timms_method,
    "module replaced": replaced,
    "weight replaced": weight_replaced,
    "hook": hooked,
    "other class": other_class,
    "own forward": own_forward,
    "hook on every module": hook_everywhere,
    "attribute": lambda model: setattr(model.norm, "eps", 0.5),
    "module removed": lambda model: setattr(model, "blocks", nn.Sequential()),
    "parameter frozen": lambda model: model.head.weight.requires_grad_(False),
    "bias removed": lambda model: setattr(model.head, "bias", None),
    "epsilon of a block": lambda model: setattr(model.blocks[0].norm2, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_module_is_seen(inference, plans, change):
    model, x = inference
    before = model(x)
    CHANGES[change](model)
    try:
        got = plans.called(lambda: model(x), plan=False)
        with _plans.in_python():
            assert_equal([got], [model(x)])
        if change not in ("parameter frozen", "hook on every module"):
            assert not torch.equal(got, before)
    finally:
        getattr(model, "undo", lambda: None)()


def other_values(model, x):
    model.head.weight.mul_(2)


def other_memory(model, x):
    model.head.weight.data = 2 * model.head.weight.data


def other_images(model, x):
    x.mul_(2)


@pytest.mark.parametrize("change", [other_values, other_memory, other_images])
def test_values_are_read_at_each_call(inference, plans, change):
    model, x = inference
    before = model(x)
    change(model, x)
    got = plans.called(lambda: model(x))
    with _plans.in_python():
        assert_equal([got], [model(x)])
    assert not torch.equal(got, before)


SETTINGS = {
    "exclude": lambda: kernels.exclude("attention"),
    "tuned tables": _tuned.forget,
    "determinism": lambda: torch.use_deterministic_algorithms(False),
    "grad mode": lambda: torch.set_grad_enabled(True),
}
CONTEXTS = {
    "forced": lambda: _tuned.forced("attention", {"implementation": "torch"}),
    "attention of PyTorch": lambda: sdpa_kernel(SDPBackend.MATH),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "in_python": _plans.in_python,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_changes_is_seen(inference, plans, setting):
    model, x = inference
    try:
        SETTINGS[setting]()
        plans.called(lambda: model(x), plan=False)
    finally:
        kernels.exclude()
        torch.set_grad_enabled(False)


@pytest.mark.cpu("the autocast of a CPU")
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_is_seen(inference, plans, context):
    model, x = inference
    with CONTEXTS[context]():
        plans.called(lambda: model(x), plan=False)
    if context != "forced":  # then a plan is recorded once more
        plans.called(lambda: model(x))


class Seen(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def in_mode(model, x):
    with Seen() as seen:
        model(x)
    assert seen.count > 5


def of_a_subclass(model, x):
    model(x.as_subclass(Subclass))


def in_vmap(model, x):
    torch.func.vmap(model)(x[None])


def in_functional_call(model, x):
    torch.func.functional_call(model, {"head.bias": model.head.bias + 1}, (x,))


def with_saved_tensor_hooks(model, x):
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        model(x)


def in_jit_trace(model, x):
    torch.jit.trace(model, (x,), check_trace=False)


def in_explain(model, x):
    assert kernels.explain(lambda: model(x))


@pytest.mark.cpu("traces on a CPU")
@pytest.mark.parametrize(
    "call",
    [
        in_mode,
        of_a_subclass,
        in_vmap,
        in_functional_call,
        with_saved_tensor_hooks,
        in_jit_trace,
        in_explain,
    ],
)
def test_python_runs_where_each_operator_must_be_seen(inference, plans, call):
    model, x = inference
    for _ in range(3):
        plans.called(lambda: call(model, x), plan=False)
    plans.called(lambda: model(x), plan=call is not in_functional_call)


def test_compile_and_export_trace_through(inference, plans):
    model, x = inference
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_equal([compiled(x)], [expected])
    exported = torch.export.export(model, (x,)).module()
    assert_equal([exported(x)], [expected])


def test_other_calls(inference, plans):
    model, x = inference
    with torch.no_grad():
        plans.called(lambda: model(x.clone(memory_format=torch.channels_last)), plan=False)
        plans.called(lambda: model(x[:, :, :, ::1].transpose(2, 3)), plan=False)
        odd = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
        odd.copy_(x)
        got = plans.called(lambda: model(odd), plan=False)
        assert_equal([got], [model(x)])


def test_bad_input_has_its_error(inference, plans):
    model, x = inference
    for bad in (x[:, :1], x[:, :, :20], x[0], x.int()):
        for _ in range(3):
            with pytest.raises((ValueError, TypeError, RuntimeError, AssertionError)):
                model(bad)
    plans.called(lambda: model(x))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_have_plans_of_their_own(inference, plans, copied):
    model, x = inference
    expected, other = model(x), copied(model)
    assert not other.__dict__["_plans"] if copied is not copy.copy else True
    if copied is not copy.copy:
        other.head.weight.mul_(2)
    plans.called(lambda: other(x), plan=False)
    assert torch.equal(other(x), expected) == (copied is copy.copy)
    assert_equal([plans.called(lambda: model(x))], [expected])


def test_a_replica_of_data_parallel_has_plans_of_its_own(inference, plans):
    model, x = inference
    expected, replica = model(x), model._replicate_for_data_parallel()
    for name, parameter in model._parameters.items():
        setattr(replica, name, parameter)  # as DataParallel does
    replica.head = nn.Linear(64, 11, dtype=x.dtype)
    assert not torch.equal(plans.called(lambda: replica(x), plan=False), expected)
    assert_equal([plans.called(lambda: model(x))], [expected])


def test_models_are_freed(plans, device):
    def used():
        model, x = small(device)
        with torch.no_grad():
            plans.warm(lambda: model(x))
        plans.warm(lambda: stepped(model, x))
        model.head.weight.register_hook(lambda grad, model=model: None)
        return weakref.ref(model)

    gone = used()
    gc.collect()
    assert gone() is None


def test_modules_that_change_all_the_time_stay_in_python(inference, plans):
    model, x = inference
    for i in range(3 * MOST_STALE):
        model.norm.eps = 1e-6 * (i + 1)
        model(x)
    assert _plans.why_not(model) == {"forward": "its modules changed at nearly every call"}
    model.norm.eps = 1e-6
    plans.called(lambda: model(x), plan=False)


def test_random_choices_stay_in_python(plans, device):
    model, x = small(device, patch_drop_rate=0.5)
    model.train()
    for _ in range(4):
        stepped(model, torch.cat([x] * 20))
    assert "random numbers" in _plans.why_not(model)["embed"]


class Scaled(layers.VisionTransformer):
    scale = [1]

    def forward_head(self, x, pre_logits=False):
        return self.scale[0] * super().forward_head(x, pre_logits)


def test_code_of_a_subclass_is_not_left_out(plans, device):
    model, x = small(device, distilled=False)
    model.__class__ = Scaled
    with torch.no_grad():
        once = [plans.called(lambda: model(x), plan=False) for _ in range(4)][-1]
        Scaled.scale[0] = 2
        assert_equal([model(x)], [2 * once])
        Scaled.scale[0] = 1
    assert "a Scaled is of" in _plans.why_not(model)["forward"]


def test_parameters_can_be_swapped(inference, plans):
    model, x = inference
    before, other = model(x), nn.Parameter(2 * model.head.weight.detach())
    torch.utils.swap_tensors(model.head.weight, other)
    assert not torch.equal(model(x), before)


def test_restored_models_keep_no_plans(inference):
    model, _ = inference
    deit_fast.restore(model)
    assert not any("_plans" in m.__dict__ for m in model.modules())
    assert b"deit_fast" not in pickle.dumps(model)


def test_why_not(plans, device):
    model, x = small(device)
    with torch.no_grad():
        model.blocks[0].attn.register_forward_hook(lambda *args: None)
        for _ in range(3):
            plans.called(lambda: model(x), plan=False)
        assert _plans.why_not(model)["forward"] == "a Attention has hooks"


def test_as_many_kinds_as_a_server_has(plans, device):
    model, _ = small(device)
    norm_and_head = model._norm_and_head
    with torch.no_grad():
        for _ in range(2):
            for tokens in range(4, 44):
                norm_and_head(torch.zeros(1, tokens, 64, dtype=torch.bfloat16, device=device))
        for tokens in range(4, 44):
            x = torch.zeros(1, tokens, 64, dtype=torch.bfloat16, device=device)
            plans.called(lambda x=x: norm_and_head(x))


@pytest.mark.parametrize("training", [False, True])
def test_profilers_see_a_range_for_each_operation(inference, plans, training):
    model, x = inference
    torch.set_grad_enabled(training)
    call = (lambda: stepped(model, x)) if training else lambda: model(x)
    with _plans.in_python(), torch.profiler.profile() as python:
        call()
    plans.called(call, plan=not training)
    call()
    with torch.profiler.profile() as profile:
        plans.called(call)
    ours = [
        [e.name for e in p.events() if e.name.startswith("deit_fast::")] for p in (python, profile)
    ]
    if training:  # through the dispatcher Python has a range for forward and none for backward
        assert {"deit_fast::layer_norm_mlp_backward", *ours[0]} <= set(ours[1])
    else:
        assert len(ours[1]) > 5


class Picks(nn.Module):
    @_plans.planned()
    def forward(self, x, i):
        return x.index_select(0, i) * 2


def test_errors_in_a_plan_are_pytorchs(plans, device):
    module, x = Picks(), torch.arange(3.0, device=device)
    good, bad = torch.tensor([1, 2], device=device), torch.tensor([1, 7], device=device)
    assert_equal([plans.warm(lambda: module(x, good))], [torch.tensor([2.0, 4.0])])
    if device == "cpu":
        with pytest.raises(IndexError, match="out of range"), plans.expected(plan=True):
            module(x, bad)
        assert_equal([plans.called(lambda: module(x, good))], [torch.tensor([2.0, 4.0])])
