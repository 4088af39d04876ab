"""The figures of `python -m benchmarks.accuracy`: what the kernels do costs what it says."""

import pytest
import torch
from checking import assert_at_most, assert_close, assert_within

from benchmarks import accuracy
from deit_fast.kernels import linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stream", accuracy.STREAMS)
def test_folding_errs_less_than_two_operations(stream, dtype):
    found = accuracy.layer_norm_gemm(stream, 192, dtype)
    assert 0 < found["folded"] < found["separate"]
    if stream == "offset":  # why sums are of the rounded weight, and fp32 is not folded
        assert found["sums not rounded"] > 5 * found["folded"]
        assert found["fp32 residual, cast"] > 5 * found["folded"]


def test_gelu_is_the_kernels(device):
    x = torch.linspace(-9, 9, 2048, device=device).half()[:, None]
    one, zero = torch.ones(1, 1, device=device).half(), torch.zeros(2048, 1, device=device)
    y = linear(x, one, activation="gelu", residual=zero, implementation="triton")
    assert_close(y, accuracy.gelu(x.float()))


def test_gelu_forms():
    found = accuracy.gelu_forms()
    assert_at_most(found["the kernels'"][0], 3.1e-5, "largest error")
    assert_at_most(found["the kernels'"][2], 0.55, "half units of bf16, not yet rounded")
    assert_within(found["erf, rounded to bf16"][2], 1.0, 0.01, "half units, the largest of many")
    assert all(units > 10 for name, (_, _, units) in found.items() if "of a quintic" in name)


def test_short_sums_of_fp8_err_far_less_than_its_operands():
    found = accuracy.short_sums(384, rows=32)
    assert 1e-5 < found["sums"] < found["operands"] / 20
    assert found["both"] < 1.01 * found["operands"] < 0.05
