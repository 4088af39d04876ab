"""The fused backward of attention: tiles of several chips, and a packed gradient of qkv."""

from functools import partial

import pytest
import torch
from checking import FP16, FP32, HALVES, assert_close, assert_equal, check, seed

from deit_fast.kernels import attention, attention_reference
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.attention.backward import run_backward
from deit_fast.kernels.attention.configs import meta_backward
from deit_fast.kernels.attention.op import _fwd, attention_backward
from deit_fast.kernels.cases import attention_inputs as make_inputs

triton_attention = partial(attention, implementation="triton")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(198, 198), (2, 70), (33, 65)], ids=str)
def test_backward_on_an_a100(shape, dtype, device):
    """Fewer queries per program than on Hopper."""
    N, L = shape
    assert (
        meta_backward(N, L, dtype, (8, 0))["BLOCK_M"]
        < meta_backward(64, L, dtype, (9, 0))["BLOCK_M"]
    )
    with simulate_device(Chip("A100", (8, 0), 108)):
        check(
            triton_attention, attention_reference, make_inputs(1, 2, N, L, 32, device=device), dtype
        )


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("N", [5, 64, 70])
def test_packed_backward(N, capability, device):
    """The gradients of separate q, k and v in one tensor, and partial sums of its rows."""
    seed(0)
    qkv = torch.randn(2, N, 3, 3, 32, device=device).half()
    do = torch.randn(2, N, 3, 32, device=device).half()
    with simulate_device(Chip("some GPU", capability, 108)):
        o, lse = _fwd(*qkv.unbind(2), None, 0.2, True, "triton")
        dqkv = torch.full_like(qkv, torch.nan)
        sums = run_backward(*dqkv.unbind(2), do, *qkv.unbind(2), o, lse, 0.2, sums=True)
        separate = attention_backward(do, *qkv.unbind(2), o, lse, 0.2)
    assert_equal(dqkv, torch.stack(separate, 2))
    sums = torch.cat([t.sum(0) for t in sums]).view(3, 3, 32)
    assert_close(sums, dqkv.float().sum((0, 1)), dtype=FP16)  # the sums are of unrounded gradients


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_all_scores_far_below_zero(dtype, device):
    """exp(0 - LSE) overflows: padded keys, of zeros, must not contribute.

    Most of a row's gradient is the rounding error of ds times the mean of the keys, so the test
    takes many rows.
    """
    inputs = make_inputs(2, 2, 70, 33, 32, device=device)
    inputs["q"] = inputs["q"] / 8 + 4
    inputs["k"] = inputs["k"] / 8 - 8
    check(triton_attention, attention_reference, inputs, dtype)
