"""layer_norm_quantized against fp64: values and scales, rows that are not finite, bad input."""

from functools import partial

import pytest
import torch
from checking import ROW_DTYPES, assert_as_accurate, assert_close

from deit_fast.kernels import (
    cases,
    dequantize,
    layer_norm_quantized,
    layer_norm_quantized_reference,
    layer_norm_reference,
)
from deit_fast.kernels.cases import layer_norm_inputs as make_inputs
from deit_fast.kernels.layer_norm_quantized import _fwd
from deit_fast.kernels.quantize import FORMATS, LIMITS, TINY

FORMAT = pytest.mark.parametrize("format", FORMATS)


@FORMAT
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.LAYER_NORM, ids=str)
def test_no_less_accurate_than_the_reference(case, dtype, format, device):
    """Half a step from fp64's result at most, the step being that of the row's largest value."""
    inputs = {k: t.to(dtype) for k, t in make_inputs(**case, device=device).items()}
    q = layer_norm_quantized(**inputs, format=format, implementation="triton")
    expected = layer_norm_quantized_reference(**inputs, format=format)
    rows = inputs["x"].numel() // inputs["x"].shape[-1]
    assert q.values.shape == inputs["x"].shape and q.values.dtype == FORMATS[format]
    assert q.scales.shape == expected.scales.shape == (1, rows)
    assert_close(q.scales, expected.scales)
    exact = layer_norm_reference(**{k: t.double() for k, t in inputs.items()})
    half = 0.5 if format == "int8" else 16.0
    allowed = (half + 0.02) * q.scales.view(*inputs["x"].shape[:-1], 1) + 1e-5
    assert ((dequantize(q) - exact).abs() <= allowed).all()
    if rows:
        assert (q.values.float().abs().amax(-1) == LIMITS[q.values.dtype]).all()
        assert_as_accurate(dequantize(q), dequantize(expected), exact, factor=1.1)


@FORMAT
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_rows_do_not_touch_each_other(format, implementation, device):
    """Not a number, infinite, constant (whose result is the bias), and all zeros."""
    inputs = make_inputs((9, 100), device)
    call = partial(layer_norm_quantized, format=format, implementation=implementation)
    clean = call(**inputs)
    inputs["x"][1, 5], inputs["x"][4, 99], inputs["x"][6] = torch.nan, -torch.inf, 2.0
    q = call(**inputs)
    rest = [0, 2, 3, 5, 7, 8]
    assert torch.equal(q.values[rest].float(), clean.values[rest].float())
    assert torch.equal(q.scales[:, rest], clean.scales[:, rest])
    assert dequantize(q)[[1, 4]].isnan().all() and q.scales[0, [1, 4]].isinf().all()
    bound = inputs["bias"].abs().max() / 25
    assert ((dequantize(q)[6] - inputs["bias"]).abs() < bound).all()
    zeros = call(
        inputs["x"][rest], torch.zeros(100, device=device), torch.zeros(100, device=device)
    )
    assert (zeros.scales == TINY).all() and (dequantize(zeros) == 0.0).all()


def test_non_contiguous_input(device):
    inputs = make_inputs((6, 64), device)
    x = inputs.pop("x")
    expected = layer_norm_quantized(x, **inputs, implementation="triton")
    strided = {k: t.repeat_interleave(2)[::2] for k, t in inputs.items()}
    got = layer_norm_quantized(x.t().contiguous().t(), **strided, implementation="triton")
    assert torch.equal(got.values.float(), expected.values.float())
    assert torch.equal(got.scales, expected.scales)


@FORMAT
def test_op_contract(format, device):
    inputs = make_inputs((6, 64), device)
    torch.library.opcheck(_fwd.op, (*inputs.values(), 1e-6, FORMATS[format]))

    def f(x, weight, bias):
        return dequantize(layer_norm_quantized(x.cos(), weight, bias, 1e-6, format, "triton")).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**inputs), f(**inputs))
    on_meta = {k: t.to("meta") for k, t in inputs.items()}
    assert f(**on_meta).shape == (6, 64) and f(**on_meta).is_meta


def test_bad_input_is_named():
    x, weight, bias = make_inputs((6, 64)).values()
    for wrong, error, message in (
        ((x.double(), weight, bias), TypeError, "layer_norm_quantized: x has dtype torch.float64"),
        (
            (x, weight[:3], bias),
            ValueError,
            r"quantized: weight has shape \(3,\), expected \(64,\)",
        ),
        (
            (x[:, :0], weight, bias),
            ValueError,
            r"quantized: x has shape \(6, 0\), expected",
        ),
    ):
        with pytest.raises(error, match=message):
            layer_norm_quantized(*wrong)
    with pytest.raises(ValueError, match="layer_norm_quantized: format 'fp16', expected one of"):
        layer_norm_quantized(x, weight, bias, format="fp16")
    with pytest.raises(ValueError, match="implementation: 'cuda' for layer_norm_quantized"):
        layer_norm_quantized(x, weight, bias, implementation="cuda")
