"""window_attention against fp64, and its windows and biases against those of timm's TinyViT."""

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
    assert_equal,
    check,
    check_compiles,
)
from tiers import slow_but
from timm.models.tiny_vit import Attention

from deit_fast.kernels import attention_reference, cases, window_attention
from deit_fast.kernels import window_attention_reference as reference
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import window_attention_inputs as make_inputs
from deit_fast.kernels.window_attention import offsets
from deit_fast.kernels.window_attention.op import _bwd, _fwd

triton_attention = partial(window_attention, implementation="triton")


SMALL = [case for case in cases.WINDOW_ATTENTION if case["window"] < 12]


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("case", slow_but(cases.WINDOW_ATTENTION, *SMALL), ids=str)
def test_no_less_accurate_than_torch(case, dtype, device):
    # PyTorch gives no gradient to the biases of an empty batch
    check(triton_attention, reference, make_inputs(**case, device=device), dtype, case["B"] > 0)


@pytest.mark.parametrize("window", [1, 2, 7, 12])
def test_offsets_are_those_of_timm(window):
    timms = Attention(64, 32, 2, attn_ratio=1, resolution=(window, window))
    assert torch.equal(offsets(window), timms.attention_bias_idxs)


def test_reference_by_hand():
    """Each window sliced out, with its bias table filled pair by pair."""
    inputs = make_inputs(2, 4, 6, 3, 2)
    qkv, biases = inputs["qkv"], inputs["biases"]
    got = reference(**inputs)
    table = torch.empty(3, 4, 4)
    for n in range(4):
        for m in range(4):
            table[:, n, m] = biases[:, abs(n // 2 - m // 2) * 2 + abs(n % 2 - m % 2)]
    for y in range(0, 4, 2):
        for x in range(0, 6, 2):
            q, k, v = qkv[:, y : y + 2, x : x + 2].reshape(2, 4, 3, 3, 32).unbind(3)
            expected = attention_reference(q, k, v, bias=table)
            assert_close(got[:, y : y + 2, x : x + 2].reshape(2, 4, 3, 32), expected)


def test_windows_of_one_token(device):
    inputs = make_inputs(2, 3, 2, 2, 1, device=device)
    assert torch.equal(triton_attention(**inputs), inputs["qkv"][..., 2, :])


@pytest.mark.slow
def test_biases_gradient_in_many_chunks(device):
    """More windows than programs: each program sums several."""
    inputs = make_inputs(3, 12, 12, 2, 4, device=device)
    with simulate_device(Chip("some GPU", (9, 0), 2)):
        check(triton_attention, reference, inputs, FP32)


@pytest.mark.slow
def test_biases_without_gradient(device, monkeypatch):
    inputs = make_inputs(1, 7, 7, 2, 7, device=device)
    qkv, biases = inputs["qkv"].requires_grad_(), inputs["biases"]
    asked = []

    def spy(*args):
        asked.append(args[-1])
        return _bwd(*args)

    monkeypatch.setattr(sys.modules[_bwd.body.__module__], "_bwd", spy)
    (got,) = torch.autograd.grad(triton_attention(**inputs).sum(), qkv)
    assert asked == [False]
    (expected,) = torch.autograd.grad(reference(**inputs).sum(), qkv)
    assert_close(got, expected)
    o, lse = _fwd(qkv.detach(), biases, 7, 0.2, True)
    assert _bwd(o, qkv.detach(), biases, o, lse, 7, 0.2, False)[1].numel() == 0


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
def test_scale(scale, device):
    inputs = make_inputs(1, 7, 7, 2, 7, device=device)
    got = triton_attention(**inputs, scale=scale)
    assert_close(got, reference(**inputs, scale=scale))


def test_non_contiguous_input(device):
    inputs = make_inputs(2, 7, 14, 2, 7, device=device)
    expected = reference(**inputs)
    inputs["qkv"] = inputs["qkv"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["biases"] = inputs["biases"].t().contiguous().t()
    got = triton_attention(**inputs)
    assert_close(got, expected)
    assert got.is_contiguous()


def test_large_scores_do_not_overflow(device):
    inputs = make_inputs(1, 7, 7, 2, 7, device=device)
    inputs["qkv"] *= 60
    check(triton_attention, reference, inputs, FP16, grads=False)


def test_biases_far_above_zero(device):
    """exp(bias - 0) overflows: padded queries, of zeros, must not contribute."""
    inputs = make_inputs(1, 7, 7, 1, 7, device=device)
    inputs["biases"] += 100
    qkv, biases = inputs["qkv"].requires_grad_(), inputs["biases"].requires_grad_()
    upstream = torch.randn(1, 7, 7, 1, 32, device=device)
    exact = (qkv.detach().double().requires_grad_(), biases.detach().double().requires_grad_())
    got, expected, true = (
        torch.autograd.grad(fn(*leaves, 7), leaves, upstream.to(leaves[0]))
        for fn, leaves in (
            (triton_attention, (qkv, biases)), (reference, (qkv, biases)), (reference, exact)
        )
    )  # fmt: skip
    for name, *grads in zip(("qkv", "biases"), got, expected, true, strict=True):
        # in units of log2 scores and LSE are above 128, where fp32 is half as precise as for
        # PyTorch's, near 100; backward subtracts one from the other
        assert_as_accurate(*grads, name, factor=5)


def test_nan_stays_in_its_window_and_head(device):
    inputs = make_inputs(1, 7, 14, 2, 7, device=device)
    inputs["qkv"][0, 3, 9, 1, 1, 5] = float("nan")
    nan = triton_attention(**inputs).isnan()
    assert nan[:, :, 7:, 1].all() and nan.sum() == nan[:, :, 7:, 1].numel()


def test_autocast(device):
    """qkv is cast to autocast's dtype; biases stay fp32, as in the model."""
    inputs = make_inputs(1, 7, 7, 2, 7, device=device)
    with torch.autocast(device, FP16):
        got = triton_attention(**inputs)
    assert got.dtype == FP16
    expected = triton_attention(inputs["qkv"].half(), inputs["biases"], 7)
    assert_equal(got, expected)


def test_second_derivative(device):
    inputs = make_inputs(1, 2, 4, 1, 2, device=device)
    qkv, biases = (inputs[n].double().float().requires_grad_() for n in ("qkv", "biases"))

    def second(fn):
        (first,) = torch.autograd.grad(fn(qkv, biases, 2).square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (qkv, biases))

    def explicit(qkv, biases, window):
        q, k, v = qkv.view(1, 2, 2, 2, 1, 3, 32).permute(5, 0, 2, 4, 1, 3, 6).reshape(3, 2, 4, 32)
        s = q @ k.transpose(-2, -1) * 32**-0.5 + biases[:, offsets(2, biases.device)]
        o = (s.softmax(-1) @ v).view(1, 2, 1, 2, 2, 32)
        return o.permute(0, 3, 1, 4, 2, 5).reshape(1, 2, 4, 1, 32)

    assert_close(second(triton_attention), second(explicit))


def test_opcheck(device):
    inputs = make_inputs(1, 4, 2, 2, 2, device=device)
    qkv, biases = inputs["qkv"].requires_grad_(), inputs["biases"].requires_grad_()
    torch.library.opcheck(_fwd.op, (qkv, biases, 2, 0.2, True))
    with torch.no_grad():
        o, lse = _fwd(qkv, biases, 2, 0.2, True)
        torch.library.opcheck(_fwd.op, (qkv, biases, 2, 0.2, False))
        torch.library.opcheck(_bwd.op, (o, qkv.detach(), biases.detach(), o, lse, 2, 0.2, True))


def test_compiles(device):
    inputs = make_inputs(1, 4, 2, 2, 2, device=device)
    check_compiles(lambda a, b: triton_attention(a, b, 2), [inputs["qkv"], inputs["biases"]])


def test_errors(device):
    inputs = make_inputs(1, 7, 14, 2, 7, device=device)
    qkv, biases = inputs["qkv"], inputs["biases"]
    for bad, error, says in (
        ({"qkv": qkv[0]}, ValueError, r"qkv has shape \(7, 14, 2, 3, 32\)"),
        ({"qkv": qkv[..., :16]}, ValueError, r"expected \(B, Y, X, H, 3, 32\)"),
        ({"qkv": qkv[:, :6]}, ValueError, "window 7 on a map of 6 x 14"),
        ({"window": 0}, ValueError, "window 0"),
        ({"biases": biases[:1]}, ValueError, r"biases has shape \(1, 49\), expected \(2, 49\)"),
        ({"biases": biases.double()}, TypeError, "biases have dtype torch.float64"),
        ({"qkv": qkv.double()}, TypeError, "float64"),
    ):
        with pytest.raises(error, match=says):
            triton_attention(**(inputs | bad))
