"""layer_norm_attention as one operation against fp64; in training it is one autograd node."""

import sys
from functools import partial

import pytest
import torch
from checking import (
    DOT_DTYPES,
    FP16,
    FP32,
    assert_as_accurate,
    assert_close,
    check,
    check_compiles,
    seed,
)
from tiers import slow

from deit_fast.kernels import (
    cases,
    layer_norm_attention,
    layer_norm_attention_reference,
)
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import layer_norm_attention_inputs as make_inputs
from deit_fast.kernels.layer_norm_attention import _train, _train_backward

triton_layer_norm_attention = partial(layer_norm_attention, implementation="triton")


def pre_norm(fn):
    """fn with its input as the residual too."""
    return lambda x, **rest: fn(x=x, residual=x, **rest)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
@pytest.mark.parametrize("case", cases.LAYER_NORM_ATTENTION, ids=str)
def test_no_less_accurate_than_torch(case, scales, dtype, device):
    inputs = make_inputs(**case, scales=scales, device=device)
    fn = pre_norm(triton_layer_norm_attention)
    check(fn, pre_norm(layer_norm_attention_reference), inputs, dtype)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 18, 20])
@pytest.mark.parametrize("node", [True, False])
def test_the_first_tokens_as_queries(node, queries, dtype, device):
    """In one node, and in parts where the residual is not x."""
    inputs = make_inputs(3, 2, 20, 64, 32, scales=queries > 1, device=device)
    inputs |= {"queries": queries} | ({"qkv_bias": None} if queries == 18 else {})
    ours, reference = triton_layer_norm_attention, layer_norm_attention_reference
    if node:
        check(pre_norm(ours), pre_norm(reference), inputs, dtype)
    else:
        check(ours, reference, inputs | {"residual": torch.randn_like(inputs["x"])}, dtype)


def test_eps(device):
    """As large as the variance: a millionth is not seen."""
    inputs = make_inputs(2, 2, 20, 64, 32, device=device) | {"eps": 0.5}
    check(triton_layer_norm_attention, layer_norm_attention_reference, inputs, FP16)


@pytest.mark.parametrize("implementation", ["triton", "cublas"])
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_or_recomputed(recompute, implementation, device):
    """Also without a residual and without biases. Of fewer images the error of qkv_bias's gradient,
    a third of which is zero in truth, is luck."""
    inputs = make_inputs(8, 2, 20, 64, 32, device=device)
    nodes = []

    def fn(**inputs):
        y = layer_norm_attention(**inputs, implementation=implementation, recompute=recompute)
        nodes.append(y.grad_fn and y.grad_fn.name())
        return y

    with simulate_device(Chip("H200", (9, 0), 4)):  # "cublas" leaves attention to "auto"
        check(fn, layer_norm_attention_reference, inputs, FP16)
        inputs |= {"qkv_bias": None, "proj_bias": None}
        check(pre_norm(fn), pre_norm(layer_norm_attention_reference), inputs, FP16)
    assert sum("layer_norm_attention_training" in str(name) for name in nodes) == 2


def test_one_node_saves_what_the_docstring_lists(device):
    inputs = make_inputs(2, 2, 20, 64, 32, scales=False, device=device)
    x = inputs["x"].requires_grad_()
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), str)
    with hooks:
        triton_layer_norm_attention(**inputs, residual=x)
    M = 2 * 20
    weights = 3 * 64 * 64 + 64 * 64 + 2 * 64 + 3 * 64 + 64
    assert sum(sizes) == (1 + 3 + 1) * M * 64 + 2 * 2 * 20 + weights


def test_without_gradients_the_parts_run(device, monkeypatch):
    module = sys.modules["deit_fast.kernels.layer_norm_attention"]
    monkeypatch.setattr(module, "_train", None)
    inputs = make_inputs(2, 2, 20, 64, 32, device=device)
    got = pre_norm(triton_layer_norm_attention)(**inputs)
    assert_close(got, pre_norm(layer_norm_attention_reference)(**inputs))
    inputs["x"].requires_grad_()  # a residual that is not x
    other = torch.randn_like(inputs["x"])
    got = triton_layer_norm_attention(**inputs, residual=other)
    assert_close(got, layer_norm_attention_reference(**inputs, residual=other))


def test_autocast_keeps_the_residual_stream_in_fp32(device):
    inputs = make_inputs(2, 2, 20, 64, 32, device=device)
    exact = pre_norm(layer_norm_attention_reference)(
        **{k: v if k == "num_heads" else v.double() for k, v in inputs.items()}
    )
    inputs["x"].requires_grad_()
    weight = inputs["qkv_weight"].requires_grad_()
    with torch.autocast(device, FP16):
        got = pre_norm(triton_layer_norm_attention)(**inputs)
        torchs = pre_norm(layer_norm_attention_reference)(**inputs)
    assert got.dtype == torchs.dtype == FP32
    assert_as_accurate(got, torchs, exact)
    (grad,) = torch.autograd.grad(got, weight, torch.randn_like(got))
    assert grad.dtype == FP32


@pytest.mark.parametrize("recompute", [slow(False), True])
def test_op_contract(recompute, device):
    inputs = make_inputs(2, 2, 5, 64, 32, device=device)
    num_heads = inputs.pop("num_heads")
    tensors = [t.requires_grad_() for t in inputs.values()]
    tensors[-1] = tensors[-1].detach()  # row_scale gets no gradient
    for queries, dtype in ((0, FP32), (2, FP16)):
        settings = (num_heads, queries, 1e-6, 0.2, True, recompute, dtype, "triton")
        torch.library.opcheck(_train.op, (*tensors, *settings))
        with torch.no_grad():
            dy, *saved = _train(*tensors, *settings)
            given = (torch.randn_like(dy), *(t.detach() for t in tensors), *saved)
        for wants in ((True, True), (False, False)):
            torch.library.opcheck(_train_backward.op, (*given, 1e-6, 0.2, True, *wants))


def test_compiles_into_one_graph(device):
    leaves = list(make_inputs(2, 2, 6, 64, 32, False, device).values())
    num_heads = leaves.pop()

    def f(x, *rest):
        x = 2 * x  # exact, compiled or not
        return 2 * triton_layer_norm_attention(x, *rest, num_heads, residual=x)

    check_compiles(f, leaves)


def test_second_derivative(device):
    inputs = make_inputs(1, 1, 4, 32, 32, device=device)
    leaves = [inputs[k].requires_grad_() for k in ("x", "norm_weight", "qkv_weight", "layer_scale")]

    def second(fn):
        y = pre_norm(fn)(**inputs)
        seed(2)
        grads = torch.autograd.grad(y, leaves, torch.randn_like(y), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    def reference(x, **rest):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return layer_norm_attention_reference(x, **rest)

    got, expected = second(triton_layer_norm_attention), second(reference)
    assert_close(got, expected)


def test_empty_batch(device):
    inputs = make_inputs(2, 2, 5, 64, 32, device=device)
    inputs |= {k: inputs[k][:0] for k in ("x", "row_scale")}
    weight = inputs["qkv_weight"].requires_grad_()
    (grad,) = torch.autograd.grad(pre_norm(triton_layer_norm_attention)(**inputs).sum(), weight)
    assert grad.shape == weight.shape and not grad.any()


@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(grad, device):
    inputs = make_inputs(2, 2, 5, 64, 32, scales=False, device=device)
    inputs["x"].requires_grad_(grad)
    fn = triton_layer_norm_attention
    with pytest.raises(ValueError, match=r"\(2, 5, 64\) and qkv_weight \(191, 64\)"):
        fn(**inputs | {"qkv_weight": inputs["qkv_weight"][:-1]})
    with pytest.raises(
        ValueError, match=r"(norm_weight|weight) has shape \(63,\), expected \(64,\)"
    ):
        fn(**inputs | {"norm_weight": torch.zeros(63, device=device)})
    with pytest.raises(ValueError, match=r"bias has shape \(63,\), expected \(64,\)"):
        fn(**inputs | {"proj_bias": torch.zeros(63, device=device)})
    for queries in (0, 6):
        with pytest.raises(ValueError, match=f"queries is {queries}, expected 1 to 5"):
            fn(**inputs, queries=queries)
    with pytest.raises(TypeError, match="dtype torch.float16, expected torch.float32"):
        fn(**inputs | {"proj_weight": inputs["proj_weight"].half()})
