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
    dequantize,
    layer_norm,
    layer_norm_quantized,
    layer_norm_quantized_reference,
    layer_norm_reference,
)
from deit_fast.kernels.cases import layer_norm_inputs as make_inputs
from deit_fast.kernels.layer_norm import _fwd, _fwd_quantized, layer_norm_backward
from deit_fast.kernels.quantize import FORMATS, LIMITS, TINY

FORMAT = pytest.mark.parametrize("format", FORMATS)


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
    """As large as the variance: a millionth is not seen."""
    inputs = make_inputs((9, 192), device) | {"eps": 0.5}
    for fn, reference in (
        (layer_norm, layer_norm_reference), (add_layer_norm, add_layer_norm_reference),
    ):  # fmt: skip
        check(partial(fn, implementation="triton"), reference, inputs, FP32)
        inputs["residual"] = torch.randn_like(inputs["x"])


def test_fp32_stream_in_half_precision_out(device):
    inputs = make_inputs((9, 192), device)
    y = layer_norm(**inputs, out_dtype=FP16, implementation="triton")
    exact = layer_norm_reference(**{k: t.double() for k, t in inputs.items()})
    assert y.dtype == FP16
    assert_as_accurate(y, exact.half(), exact)

    x = torch.randn(9, 192, device=device, dtype=BF16)
    weight, bias = inputs["weight"], inputs["bias"]
    y, h = add_layer_norm(x, inputs["x"], weight, bias, implementation="triton")
    assert y.dtype == h.dtype == FP32  # the promoted dtype carries the stream
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


@FORMAT
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.LAYER_NORM, ids=str)
def test_quantized(case, dtype, format, device):
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
def test_quantized_rows_do_not_touch_each_other(format, implementation, device):
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


def test_quantized_non_contiguous_input(device):
    inputs = make_inputs((6, 64), device)
    x = inputs.pop("x")
    expected = layer_norm_quantized(x, **inputs, implementation="triton")
    strided = {k: t.repeat_interleave(2)[::2] for k, t in inputs.items()}
    got = layer_norm_quantized(x.t().contiguous().t(), **strided, implementation="triton")
    assert torch.equal(got.values.float(), expected.values.float())
    assert torch.equal(got.scales, expected.scales)


@FORMAT
def test_quantized_op_contract(format, device):
    inputs = make_inputs((6, 64), device)
    torch.library.opcheck(_fwd_quantized.op, (*inputs.values(), 1e-6, FORMATS[format]))

    def f(x, weight, bias):
        return dequantize(layer_norm_quantized(x.cos(), weight, bias, 1e-6, format, "triton")).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**inputs), f(**inputs))
    on_meta = {k: t.to("meta") for k, t in inputs.items()}
    assert f(**on_meta).shape == (6, 64) and f(**on_meta).is_meta


def test_quantized_bad_input_is_named():
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


def test_op_contract(device):
    x, weight, bias = make_inputs((6, 64), device).values()
    x.requires_grad_()
    torch.library.opcheck(_fwd.op, (x, None, weight, bias, 1e-6, FP32))
    torch.library.opcheck(_fwd.op, (x, torch.randn_like(x), weight, bias, 1e-6, FP32))
    dy, h = torch.randn(2, 6, 64, device=device).unbind()
    for dh in (None, dy):
        torch.library.opcheck(layer_norm_backward.op, (dy, dh, h, weight, 1e-6, FP16))


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
