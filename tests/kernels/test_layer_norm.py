"""layer_norm and add_layer_norm against fp64: values, gradients, compile, bad input."""

from functools import partial

import pytest
import torch
from checking import (
    BF16,
    FP16,
    FP32,
    ROW_DTYPES,
    assert_as_accurate,
    assert_close,
    check,
    check_compiles,
)

from deit_fast.kernels import (
    add_layer_norm,
    add_layer_norm_reference,
    cases,
    layer_norm,
    layer_norm_reference,
)
from deit_fast.kernels.cases import layer_norm_inputs as make_inputs
from deit_fast.kernels.layer_norm import _fwd, layer_norm_backward


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.LAYER_NORM, ids=str)
def test_layer_norm(case, dtype, device):
    fn = partial(layer_norm, implementation="triton")
    check(fn, layer_norm_reference, make_inputs(**case, device=device), dtype)


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.LAYER_NORM, ids=str)
def test_add_layer_norm(case, dtype, device):
    inputs = make_inputs(**case, device=device)
    inputs["residual"] = torch.randn_like(inputs["x"])
    fn = partial(add_layer_norm, implementation="triton")
    check(fn, add_layer_norm_reference, inputs, dtype)


def test_eps(device):
    """An eps as large as the variance: one of 1e-6 would make no visible difference."""
    inputs = make_inputs((9, 192), device) | {"eps": 0.5}
    for fn, reference in (
        (layer_norm, layer_norm_reference), (add_layer_norm, add_layer_norm_reference),
    ):  # fmt: skip
        check(partial(fn, implementation="triton"), reference, inputs, FP32)
        inputs["residual"] = torch.randn_like(inputs["x"])


def test_fp32_residual_stream_in_half_precision_out(device):
    inputs = make_inputs((9, 192), device)
    y = layer_norm(**inputs, out_dtype=FP16, implementation="triton")
    exact = layer_norm_reference(**{k: t.double() for k, t in inputs.items()})
    assert y.dtype == FP16
    assert_as_accurate(y, exact.half(), exact)

    x = torch.randn(9, 192, device=device, dtype=BF16)
    weight, bias = inputs["weight"], inputs["bias"]
    y, h = add_layer_norm(x, inputs["x"], weight, bias, implementation="triton")
    assert y.dtype == h.dtype == FP32  # the promoted dtype is the residual stream's
    assert_close(h, x + inputs["x"])
    assert_close(y, layer_norm_reference(h, weight, bias))


def test_outlier_channels_and_large_mean(device):
    inputs = make_inputs((33, 768), device)
    inputs["x"][:, ::97] *= 50
    inputs["x"] += 100
    check(partial(layer_norm, implementation="triton"), layer_norm_reference, inputs, FP32)


def test_non_contiguous_input(device):
    inputs = make_inputs((6, 64), device)
    x = torch.randn(64, 6, device=device).t()
    residual = torch.randn(6, 128, device=device)[:, ::2]
    got = add_layer_norm(x, residual, inputs["weight"], inputs["bias"], implementation="triton")
    expected = add_layer_norm_reference(x, residual, inputs["weight"], inputs["bias"])
    assert_close(got, expected)
    strided = [inputs[k].repeat_interleave(2)[::2] for k in ("weight", "bias")]
    got = add_layer_norm(x, residual, *strided, implementation="triton")
    assert_close(got, expected)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_weights_of_another_dtype(implementation, device):
    inputs = make_inputs((7, 64), device)
    x = inputs.pop("x")
    expected = layer_norm(x.half().float(), **inputs, implementation="torch")
    got = layer_norm(x.half(), **inputs, implementation=implementation)
    assert got.dtype == FP16
    assert_close(got, expected.half())


def test_nan_stays_in_its_row(device):
    inputs = make_inputs((8, 192), device)
    inputs["x"][3, 5] = torch.nan
    y = layer_norm(**inputs, implementation="triton")
    assert y[3].isnan().all() and not y[[0, 1, 2, 4, 5, 6, 7]].isnan().any()


def test_autocast_keeps_torchs_dtype(device):
    inputs = make_inputs((4, 64), device)
    with torch.autocast(device, BF16):
        for implementation in ("triton", "torch"):
            assert layer_norm(**inputs, implementation=implementation).dtype == FP32


def test_op_contract(device):
    x, weight, bias = make_inputs((6, 64), device).values()
    x.requires_grad_()
    torch.library.opcheck(_fwd.op, (x, None, weight, bias, 1e-6, FP32))
    torch.library.opcheck(_fwd.op, (x, torch.randn_like(x), weight, bias, 1e-6, FP32))
    dy, h = torch.randn(2, 6, 64, device=device).unbind()
    for dh in (None, dy):
        rest = (weight, bias.half(), 1e-6, FP16)
        torch.library.opcheck(layer_norm_backward.op, (dy, dh, h, *rest))
    made = layer_norm_backward(dy, None, h, *rest)
    assert [t.dtype for t in made] == [FP16, FP32, FP16]  # those asked for, weight's and bias's


def test_compiles_into_one_graph(device):
    inputs = make_inputs((6, 64), device)
    leaves = list(inputs.values())

    def f(x, weight, bias):
        y, h = add_layer_norm(x, x.cos(), weight, bias, implementation="triton")
        return y.sin() + layer_norm(h, weight, bias, implementation="triton")

    check_compiles(f, leaves)


def test_bad_input_is_named(device):
    x, weight, bias = make_inputs((6, 64), device=device).values()
    with pytest.raises(ValueError, match=r"residual has shape \(3, 64\), expected \(6, 64\)"):
        add_layer_norm(x, x[:3], weight, bias)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(64,\)"):
        layer_norm(x, weight[:3], bias)
    with pytest.raises(ValueError, match="N <= 8192"):
        layer_norm(torch.zeros(1, 9000), torch.zeros(9000), torch.zeros(9000))
    with pytest.raises(ValueError, match="implementation: 'cuda'"):
        layer_norm(x, weight, bias, implementation="cuda")
    with pytest.raises(TypeError, match="float64"):
        layer_norm(x.double(), weight, bias, implementation="triton")
