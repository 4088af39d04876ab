"""talking_heads_attention against fp64: values, and the gradients of all that it reads."""

from functools import partial

import pytest
import torch
from checking import (
    DOT_DTYPES,
    FP16,
    FP32,
    assert_as_accurate,
    assert_close,
    assert_equal,
    assert_gradients_as_accurate,
    check,
    check_compiles,
)
from selection import where

from deit_fast.kernels import (
    cases,
    talking_heads_attention,
    talking_heads_attention_reference,
)
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import talking_heads_inputs as make_inputs
from deit_fast.kernels.talking_heads.configs import CONFIGS, FP32_CONFIGS, configs
from deit_fast.kernels.talking_heads.op import _fwd, talking_heads_backward

triton_attention = partial(talking_heads_attention, implementation="triton")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.TALKING_HEADS, ids=str)
@where(lambda case, dtype: dtype != FP32 or case["H"] <= max(FP32_CONFIGS))
def test_no_less_accurate_than_torch(case, dtype, device):
    inputs = make_inputs(**case, device=device)
    # the gradient of proj_l's bias is rounding error alone: it has a test of its own
    check(
        triton_attention, talking_heads_attention_reference, inputs, dtype,
        no_grad=("proj_l_bias",),
    )  # fmt: skip


def test_configurations_depend_on_heads():
    assert [configs(H, FP16) for H in (1, 4, 6, 16)] == [CONFIGS[n] for n in (4, 4, 8, 16)]
    assert [configs(H, FP32) for H in (3, 8)] == [FP32_CONFIGS[n] for n in (4, 8)]


@pytest.mark.parametrize("N", [15, 16, 17, 32, 33])
def test_tiles_that_are_just_full_or_not(N, device):
    check(
        triton_attention, talking_heads_attention_reference, make_inputs(1, 2, N, 32, device), FP16
    )


@pytest.mark.parametrize("H", [1, 3])
def test_identity_mixing_is_plain_attention(H, device):
    inputs = make_inputs(2, H, 20, 32, device)
    eye, zero = torch.eye(H, device=device), torch.zeros(H, device=device)
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    got = triton_attention(inputs["qkv"], eye, zero, eye, zero)
    assert got.is_contiguous()
    assert_close(got, expected)


def test_without_biases(device):
    inputs = make_inputs(1, 4, 9, 48, device) | {"proj_l_bias": None, "proj_w_bias": None}
    check(triton_attention, talking_heads_attention_reference, inputs, FP32)


@pytest.mark.parametrize("H", [4, 16])
def test_the_gradient_of_the_bias_before_the_softmax_is_exactly_zero(H, device):
    inputs = {name: t.half() for name, t in make_inputs(1, H, 9, 48, device).items()}
    bias = inputs["proj_l_bias"].requires_grad_()
    (grad,) = torch.autograd.grad(triton_attention(**inputs).square().sum(), bias)
    assert grad.dtype == FP16 and not grad.any()


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0)], ids=str)
def test_sixteen_heads_train_with_pytorch_where_memory_is_short(capability, device):
    inputs = {name: t.half() for name, t in make_inputs(1, 16, 5, 48, device).items()}
    leaves = [t.requires_grad_() for t in inputs.values()]
    with simulate_device(Chip("some GPU", capability, 80)):
        got = talking_heads_attention(*leaves)
        assert torch.equal(got, talking_heads_attention_reference(*leaves))
        with pytest.raises(ValueError, match="gradients of 16 heads need 109 KB"):
            triton_attention(*leaves)
        with torch.no_grad():
            assert_close(triton_attention(*leaves), got)
    with simulate_device(Chip("H200", (9, 0), 132)):
        assert triton_attention(*leaves).grad_fn is not None


def test_the_bias_before_the_softmax_changes_nothing(device):
    inputs = make_inputs(1, 4, 9, 48, device)
    bias = inputs["proj_l_bias"].requires_grad_()
    got = triton_attention(**inputs)
    (grad,) = torch.autograd.grad(got.square().sum(), bias)
    assert grad.shape == bias.shape and not grad.any()
    inputs["proj_l_bias"] = bias + 3 * torch.randn(4, device=device)
    assert_equal(triton_attention(**inputs), got)
    assert_close(talking_heads_attention_reference(**inputs), got)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_scale_argument(scale, device):
    inputs = make_inputs(1, 4, 9, 48, device)
    expected = talking_heads_attention_reference(**inputs, scale=scale)
    assert_close(triton_attention(**inputs, scale=scale), expected)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_all_scores_far_below_zero(dtype, device):
    """exp(0 - LSE) overflows: padded keys, of zeros, must not contribute.

    Most of a row's gradient is the rounding error of ds times the mean of the keys, so the test
    takes many rows.
    """
    inputs = make_inputs(4, 4, 19, 32, device)
    inputs["qkv"] = inputs["qkv"] / 8 + torch.tensor([4.0, -4.0, 0.0], device=device).view(3, 1, 1)
    inputs["proj_l_weight"] = inputs["proj_l_weight"].abs()
    check(triton_attention, talking_heads_attention_reference, inputs, dtype)


@pytest.mark.parametrize("key", [0, 40])
def test_one_key_far_above_the_others(key, device):
    """The row maximum may be in any block of keys: e^300 would overflow."""
    inputs = make_inputs(1, 4, 41, 48, device)
    inputs["qkv"][:, :, 0] = 6.0
    inputs["qkv"][:, key, 1] = 6.0
    inputs["proj_l_weight"] = torch.eye(4, device=device)
    inputs = {name: t.half() for name, t in inputs.items()}
    exact = talking_heads_attention_reference(**{name: t.double() for name, t in inputs.items()})
    expected = talking_heads_attention_reference(**inputs)
    assert_as_accurate(triton_attention(**inputs), expected, exact)


def test_any_strides(device):
    inputs = make_inputs(2, 4, 9, 48, device)
    expected = triton_attention(**inputs)
    for order in ((1, 0, 2, 3, 4), (0, 1, 3, 4, 2)):
        back = [order.index(i) for i in range(5)]
        view = inputs["qkv"].permute(order).contiguous().permute(back)
        assert not view.is_contiguous()
        weight = inputs["proj_l_weight"].t().contiguous().t()
        got = triton_attention(**inputs | {"qkv": view, "proj_l_weight": weight})
        assert_equal(got, expected)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_stays_in_its_sample(part, device):
    inputs = make_inputs(2, 4, 9, 48, device)
    inputs["qkv"][0, 4, part, 1] = torch.nan
    o, expected = triton_attention(**inputs), talking_heads_attention_reference(**inputs)
    assert o[expected.isnan()].isnan().all() and expected[0].isnan().any()
    assert_close(o[1], expected[1])


def test_autocast(device):
    inputs = make_inputs(1, 4, 9, 48, device)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with torch.autocast(device, FP16):
        got, expected = triton_attention(**leaves), talking_heads_attention_reference(**leaves)
    assert got.dtype == expected.dtype == FP16
    exact = talking_heads_attention_reference(**{name: t.double() for name, t in inputs.items()})
    assert_as_accurate(got, expected, exact)
    upstream = torch.randn_like(exact)
    grads = torch.autograd.grad(got, list(leaves.values()), upstream.to(FP16))
    wants = torch.autograd.grad(expected, list(leaves.values()), upstream.to(FP16))
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    true = talking_heads_attention_reference(**wide)
    trues = torch.autograd.grad(true, list(wide.values()), upstream.to(FP16).double())
    named = (dict(zip(leaves, found, strict=True)) for found in (grads, wants, trues))
    assert_gradients_as_accurate(*named, dtype=FP16)
    assert {g.dtype for g in grads} == {FP32}


def test_second_derivatives(device):
    inputs = make_inputs(1, 2, 5, 32, device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    found = []
    for fn in (triton_attention, talking_heads_attention_reference):
        grads = torch.autograd.grad(fn(*leaves).square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        found.append(torch.autograd.grad(penalty, leaves))
    got, expected = (dict(zip(inputs, grads, strict=True)) for grads in found)
    terms = expected["proj_l_weight"]
    assert_close(got.pop("proj_l_bias"), expected.pop("proj_l_bias"), "proj_l_bias", terms)  # zero
    assert_close(got, expected)


def test_op_contract(device):
    qkv, *weights = make_inputs(1, 3, 5, 32, device).values()
    tensors = [t.requires_grad_() for t in (qkv, *weights)]
    torch.library.opcheck(_fwd.op, (*tensors, 0.2, True))
    qkv, wl, bl, ww, bw = (t.detach() for t in tensors)
    torch.library.opcheck(_fwd.op, (qkv, wl, None, ww, None, 0.2, False))
    o, lse = _fwd(qkv, wl, bl, ww, bw, 0.2, True)
    args = (torch.randn_like(o), qkv, wl, ww, bw, lse, 0.2)
    torch.library.opcheck(talking_heads_backward.op, args)


def test_compiles_into_one_graph(device):
    qkv, *weights = make_inputs(2, 4, 9, 48, device).values()

    def f(qkv, *weights):
        return triton_attention(qkv.sin(), *weights).cos()

    check_compiles(f, [qkv, *weights])


def test_bad_input_is_named(device):
    inputs = make_inputs(1, 4, 5, 48, device=device)

    def call(implementation="auto", **changed):
        return talking_heads_attention(**inputs | changed, implementation=implementation)

    with pytest.raises(
        ValueError, match=r"qkv has shape \(1, 5, 12, 48\), expected \(B, N, 3, H, d"
    ):
        call(qkv=inputs["qkv"].flatten(2, 3))
    with pytest.raises(ValueError, match=r"proj_w_weight has shape \(4, 3\), expected \(4, 4\)"):
        call(proj_w_weight=torch.zeros(4, 3, device=device))
    with pytest.raises(ValueError, match=r"proj_l_bias has shape \(3,\), expected \(4,\)"):
        call(proj_l_bias=torch.zeros(3, device=device))
    with pytest.raises(
        TypeError, match="proj_l_weight has dtype torch.float16, expected torch.float32"
    ):
        call(proj_l_weight=inputs["proj_l_weight"].half())
    with pytest.raises(ValueError, match="head dimension 40, the kernel takes"):
        call("triton", qkv=inputs["qkv"][..., :40])
    for heads, dtype in ((9, FP32), (17, FP16)):
        wide = make_inputs(1, heads, 2, 32, device)
        wide = {name: t.to(dtype) for name, t in wide.items()}
        with pytest.raises(ValueError, match=f"{heads} heads in {dtype}, the kernel takes 1 to"):
            call("triton", **wide)
    assert call(qkv=inputs["qkv"][..., :40]).shape == (1, 5, 4, 40)
