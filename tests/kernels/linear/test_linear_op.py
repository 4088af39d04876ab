"""The operator of linear: its contract, compilation, row statistics on demand, errors."""

import pytest
import torch
from checking import FP16, FP32, check_compiles

from deit_fast.kernels import linear
from deit_fast.kernels.cases import linear_inputs as make_inputs
from deit_fast.kernels.linear import linear_backward
from deit_fast.kernels.linear.op import _fwd


def test_row_stats_only_where_they_serve(device):
    """Few rows, fp32, a width that is no multiple of 64, gradients: none."""
    many = {"M": 8 * 64, "S": 1, "K": 64, "N": 64, "device": device}

    def row_stats(dtype=FP16, grad=False, **changed):
        inputs = make_inputs(**many | changed)
        inputs = {k: v if k == "activation" else v.to(dtype) for k, v in inputs.items()}
        inputs["weight"].requires_grad_(grad)
        return linear(**inputs, implementation="triton", return_row_stats=True)[1]

    assert row_stats() is not None
    assert (
        row_stats(M=8 * 64 - 1)
        is row_stats(FP32)
        is row_stats(N=48)
        is row_stats(grad=True)
        is None
    )
    inputs = make_inputs(**many)
    assert linear(**inputs, implementation="torch", return_row_stats=True)[1] is None


def test_op_contract(device):
    inputs = make_inputs(M=6, S=3, K=32, N=16, residual=True, layer_scale=True, device=device)
    x, weight, bias, residual, layer_scale = (
        inputs[k].flatten(0, -2) if k in ("x", "residual") else inputs[k]
        for k in ("x", "weight", "bias", "residual", "layer_scale")
    )
    tensors = [t.requires_grad_() for t in (x, weight, bias, residual, layer_scale)]
    torch.library.opcheck(_fwd.op, (*tensors, None, "gelu", False, True, "triton"))
    dy, z = torch.randn(6, 16, device=device), torch.randn(6, 16, device=device)
    scales = (layer_scale.detach(), torch.ones(3, device=device))
    half = bias.detach().half()
    torch.library.opcheck(linear_backward.op, (dy, z, half, *scales, "gelu", FP16))
    made = linear_backward(dy, z, half, *scales, "gelu", FP32)
    assert [t.dtype for t in made] == [FP32, FP16, FP32]  # that asked for, bias's, layer_scale's
    torch.library.opcheck(linear_backward.op, (dy, None, None, None, None, "none", FP32))
    rest = (None,) * 4
    torch.library.opcheck(_fwd.op, (*tensors[:2], *rest, "none", False, False, "cublas"))


def test_compiles_into_one_graph(device):
    inputs = make_inputs(M=6, S=3, K=32, N=16, residual=True, device=device)
    leaves = [inputs[k] for k in ("x", "weight", "bias", "residual")]

    def f(x, weight, bias, residual):
        return linear(x.sin(), weight, bias, "gelu", residual, implementation="triton").cos()

    check_compiles(f, leaves)


def test_bad_input_is_named():
    x, weight = torch.zeros(6, 32), torch.zeros(16, 32)
    with pytest.raises(ValueError, match=r"x has shape \(6, 32\), expected \(6, 31\)"):
        linear(x, weight[:, :31])
    with pytest.raises(ValueError, match=r"residual has shape \(6, 32\), expected \(6, 16\)"):
        linear(x, weight, residual=x)
    with pytest.raises(ValueError, match="activation 'relu'"):
        linear(x, weight, activation="relu")
    with pytest.raises(TypeError, match="weight has dtype torch.float16, expected torch.float32"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"row_scale has shape \(4,\), expected \(6,\)"):
        linear(x, weight, row_scale=torch.ones(4))
