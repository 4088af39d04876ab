"""layer_norm_mlp as one operation against fp64."""

from functools import partial

import pytest
import torch
from checking import (
    DOT_DTYPES,
    FP16,
    FP32,
    HALVES,
    NO_CODE,
    assert_as_accurate,
    assert_close,
    assert_equal,
    check,
    check_compiles,
    seed,
)

from deit_fast.kernels import _tuned, cases, layer_norm_mlp, layer_norm_mlp_reference
from deit_fast.kernels.cases import layer_norm_mlp_inputs as make_inputs
from deit_fast.kernels.layer_norm_mlp import op
from deit_fast.kernels.layer_norm_mlp.configs import AMPERE_CONFIGS, HOPPER_CONFIGS
from deit_fast.kernels.layer_norm_mlp.op import _fwd, _train, _train_backward

fused = partial(layer_norm_mlp, implementation="fused")
triton_layer_norm_mlp = partial(layer_norm_mlp, implementation="triton")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
@pytest.mark.parametrize("case", cases.LAYER_NORM_MLP, ids=str)
def test_no_less_accurate_than_torch(case, scales, dtype, device):
    inputs = make_inputs(**case, scales=scales, device=device)
    check(triton_layer_norm_mlp, layer_norm_mlp_reference, inputs, dtype)


def pre_norm(fn):
    """fn with its input as the residual too: in training one node of the autograd graph."""
    return lambda x, **rest: fn(x, residual=x, **rest)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
@pytest.mark.parametrize("case", cases.LAYER_NORM_MLP, ids=str)
def test_pre_norm_no_less_accurate_than_torch(case, scales, dtype, device):
    inputs = make_inputs(**case, scales=scales, device=device)
    del inputs["residual"]
    check(pre_norm(triton_layer_norm_mlp), pre_norm(layer_norm_mlp_reference), inputs, dtype)


def test_eps(device):
    """An eps as large as the variance: one of 1e-6 would make no visible difference."""
    inputs = make_inputs(12, 2, 64, 128, device=device) | {"eps": 0.5}
    check(triton_layer_norm_mlp, layer_norm_mlp_reference, inputs, FP16)
    inputs = half_inputs(12, 2, 64, device) | {"eps": 0.5}
    check(fused, layer_norm_mlp_reference, inputs, FP16, grads=False)


@pytest.mark.parametrize("implementation", ["triton", "cublas"])
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_or_recomputed(recompute, implementation, device):
    """Also without a residual and without biases."""
    inputs = make_inputs(12, 2, 64, 128, device=device)
    del inputs["residual"]
    fn = partial(layer_norm_mlp, implementation=implementation, recompute=recompute)
    check(fn, layer_norm_mlp_reference, inputs, FP32)
    inputs |= {"fc1_bias": None, "fc2_bias": None}
    check(pre_norm(fn), pre_norm(layer_norm_mlp_reference), inputs, FP32)


def test_one_node_saves_what_the_docstring_lists(device):
    inputs = make_inputs(40, 2, 64, 128, scales=False, device=device)
    del inputs["residual"]
    inputs["x"].requires_grad_()
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), str)
    with hooks:
        pre_norm(triton_layer_norm_mlp)(**inputs)
    weights = 2 * 64 * 128 + 2 * 64 + 128 + 64
    assert sum(sizes) == 40 * (64 + 128) + weights


def test_training_op_contract(device):
    inputs = make_inputs(6, 2, 32, 48, device=device)
    del inputs["residual"]
    tensors = [t.flatten(0, 1) if t.dim() == 3 else t for t in inputs.values()]
    tensors = [*(t.requires_grad_() for t in tensors[:-1]), tensors[-1]]
    for recompute, dtype in ((False, FP32), (True, FP16)):
        settings = (1e-6, True, recompute, dtype, "triton")
        torch.library.opcheck(_train.op, (*tensors, *settings))
        with torch.no_grad():
            dy, *saved = _train(*tensors, *settings)
            given = (torch.randn_like(dy), *(t.detach() for t in tensors), *saved)
        for wants in ((True, True), (False, False)):
            torch.library.opcheck(_train_backward.op, (*given, 1e-6, True, *wants, "triton"))


def test_second_derivative(device):
    inputs = make_inputs(6, 2, 32, 48, device=device)
    del inputs["residual"]
    leaves = [inputs[k].requires_grad_() for k in ("x", "norm_weight", "fc1_weight", "layer_scale")]

    def second(fn):
        y = pre_norm(fn)(**inputs)
        seed(2)
        grads = torch.autograd.grad(y, leaves, torch.randn_like(y), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    got, expected = second(triton_layer_norm_mlp), second(layer_norm_mlp_reference)
    assert_close(got, expected)


def test_autocast_keeps_the_residual_stream_in_fp32(device):
    inputs = make_inputs(12, 2, 64, 128, device=device)
    exact = layer_norm_mlp_reference(**{k: t.double() for k, t in inputs.items()})
    with torch.autocast(device, FP16):
        got, torchs = triton_layer_norm_mlp(**inputs), layer_norm_mlp_reference(**inputs)
    assert got.dtype == torchs.dtype == FP32
    assert_as_accurate(got, torchs, exact)


def half_inputs(M, S, hidden, device, dtype=FP16):
    inputs = make_inputs(M, S, 192, hidden, scales=False, device=device)
    return {k: t.to(dtype) for k, t in inputs.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", HOPPER_CONFIGS + AMPERE_CONFIGS, ids=str)
def test_fused_in_every_configuration_a_table_may_name(config, dtype, device):
    inputs = make_inputs(150, 2, 192, 128, scales=False, device=device)
    with _tuned.forced("layer_norm_mlp", {"implementation": "fused", **config}):
        check(fused, layer_norm_mlp_reference, inputs, dtype, grads=False)
        del inputs["fc1_bias"], inputs["fc2_bias"], inputs["residual"]
        inputs |= {"fc1_bias": None, "fc2_bias": None}
        check(fused, layer_norm_mlp_reference, inputs, dtype, grads=False)


@pytest.mark.slow
def test_fused_and_parts_leave_the_same_row_stats(device):
    inputs = half_inputs(8 * 192, 1, 64, device)
    with torch.no_grad():
        y, row_stats = fused(**inputs, return_row_stats=True)
        others = triton_layer_norm_mlp(**inputs, return_row_stats=True)
    assert_close(y, others[0])
    for i, name in enumerate(("means", "squares")):
        assert_close(row_stats[:, i], others[1][:, i], name, dtype=FP16)
    parts = y.double().view(-1, 3, 64)
    assert_close(row_stats[:, 0].t(), parts.mean(2).float())
    assert fused(**half_inputs(20, 1, 64, device), return_row_stats=True)[1] is None


def test_a_table_decides_whether_it_is_fused(device, monkeypatch):
    calls = []
    monkeypatch.setattr(op, "_fwd", lambda *args: calls.append(1) or _fwd(*args))
    inputs = half_inputs(20, 2, 64, device)
    triton_layer_norm_mlp(**inputs)
    assert not calls
    with _tuned.forced("layer_norm_mlp", {"implementation": "fused", **HOPPER_CONFIGS[2]}):
        triton_layer_norm_mlp(**inputs)
    assert len(calls) == 1
    with _tuned.forced("layer_norm_mlp", {"implementation": "parts"}):
        triton_layer_norm_mlp(**inputs)
    assert len(calls) == 1


def test_fused_op(device):
    inputs = half_inputs(20, 2, 64, device)
    tensors = [t.flatten(0, -2) if t.dim() == 3 else t for t in inputs.values()]
    torch.library.opcheck(_fwd.op, (*tensors, 1e-6, False))
    compiled = torch.compile(fused, fullgraph=True, backend=NO_CODE)(**inputs)
    assert_equal(compiled, fused(**inputs))
    empty = fused(**inputs | {k: inputs[k][:0] for k in ("x", "residual")})
    assert empty.shape == (0, 10, 192)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.zeros(2, 3, 192)}, "x is torch.float32"),
        ({"residual": torch.zeros(2, 3, 192)}, "residual is torch.float32 and x torch.float16"),
        ({"layer_scale": torch.ones(192)}, "it has no LayerScale"),
        ({"fc1_weight": torch.zeros(50, 192)}, "hidden 50, expected"),
        ({"norm_weight": torch.ones(192, requires_grad=True)}, "gradients are wanted"),
        ({"fc2_weight": torch.zeros(192, 32).half()}, r"fc2_weight has shape \(192, 32\)"),
    ],
)
def test_fused_says_why_not(changed, message):
    with pytest.raises(ValueError, match=message):
        fused(**half_inputs(6, 2, 64, "cpu") | changed)


def test_compiles_into_one_graph(device):
    leaves = make_inputs(6, 2, 32, 48, False, device).values()

    def f(*args):
        return triton_layer_norm_mlp(*args[:7], residual=args[7]).cos()

    check_compiles(f, leaves)


def test_bad_input_is_named():
    inputs = make_inputs(6, 2, 32, 48)
    with pytest.raises(ValueError, match=r"weight has shape \(31,\), expected \(32,\)"):
        layer_norm_mlp(**inputs | {"norm_weight": torch.zeros(31)})
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 32\), expected \(2, 3, 31\)"):
        layer_norm_mlp(**inputs | {"fc1_weight": torch.zeros(48, 31)})
