"""Backward of linear: GELU's in the epilogue of a matmul, empty batches, second derivatives."""

import pytest
import torch
from checking import (
    BF16,
    FP32,
    HALVES,
    assert_as_accurate,
    assert_close,
    seed,
)
from selection import skip_without_tensor_descriptors

from deit_fast.kernels import _tuned, linear
from deit_fast.kernels.cases import linear_inputs as make_inputs
from deit_fast.kernels.column_sums import column_sums_reference
from deit_fast.kernels.linear import linear_gelu_backward
from deit_fast.kernels.linear.configs import configs


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "config", [None, *configs(BF16, (9, 0), True), *configs(BF16, (8, 0), True)], ids=str
)
def test_gelu_backward_in_every_configuration(config, dtype, device):
    """dz, a and the column sums of dz; None is cuBLAS."""
    if config:
        skip_without_tensor_descriptors(config, device)
    seed(0)
    dy, weight = torch.randn(150, 72, device=device), torch.randn(72, 200, device=device) / 8
    operands = [t.to(dtype) for t in (dy, weight, torch.randn(150, 200, device=device))]

    def reference(dy, weight, z):
        dz = torch.ops.aten.gelu_backward(dy @ weight, z)
        return dz, torch.nn.functional.gelu(z), dz.sum(0)

    choice = {"implementation": "triton", **config} if config else {"implementation": "cublas"}
    with _tuned.forced("linear", choice):
        dz, a, sums = linear_gelu_backward(*operands, "auto")
    got = dz, a, column_sums_reference(sums, FP32)
    exact = reference(*(t.double() for t in operands))
    for name, ours, torchs, true in zip(
        ("dz", "a", "sums"), got, reference(*operands), exact, strict=True
    ):
        assert_as_accurate(ours, torchs, true, name)
    assert sums.dtype == FP32


def test_empty_batch_with_drop_path(device):
    inputs = make_inputs(M=4, S=2, K=64, N=48, row_scale=True, device=device)
    weight = inputs["weight"].requires_grad_()
    inputs |= {"x": inputs["x"][:0], "row_scale": inputs["row_scale"][:0]}
    (grad,) = torch.autograd.grad(linear(**inputs, implementation="triton").sum(), weight)
    assert not grad.any()


def test_second_derivative_where_only_the_residual_has_one(device):
    inputs = make_inputs(6, 2, 32, 16, activation="gelu", residual=True, device=device)
    residual = inputs["residual"].requires_grad_()
    y = linear(**inputs, implementation="triton")
    (first,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
    assert_close(first, 2 * y)
    (second,) = torch.autograd.grad(first.sum(), residual)
    assert_close(second, torch.full_like(second, 2.0))
