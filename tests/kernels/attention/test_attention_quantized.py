"""attention_quantized against fp64: o in FP8 or INT8, from float or FP8 q, k and v."""

from functools import partial

import pytest
import torch
from checking import FP16, HALVES, assert_as_accurate, assert_close, assert_within
from selection import where

from deit_fast.kernels import (
    _tuned,
    attention_quantized,
    attention_quantized_reference,
    attention_reference,
    cases,
    dequantize,
)
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.attention.configs import CONFIGS, configs
from deit_fast.kernels.attention.quantized import _fwd
from deit_fast.kernels.cases import attention_inputs as make_inputs
from deit_fast.kernels.quantize import FORMATS, round_reference

# a scale for each row of each head, or a per-tensor scale
QUANTIZED = pytest.mark.parametrize(
    "format, out_scale", [("fp8", None), ("fp8", 0.01), ("int8", None)], ids=str
)


def assert_quantized(q, k, v, format, out_scale, device, **options):
    """As close to fp64 as the reference is, with a tenth more for the rounding of the scores."""
    scale = None if out_scale is None else torch.full((1, 1), out_scale, device=device)
    options |= {"format": format, "out_scale": scale}
    got = attention_quantized(q, k, v, **options, implementation="triton")
    expected = attention_quantized_reference(q, k, v, **options)
    (B, N, H, d), dtype = q.shape, FORMATS[format]
    assert got.values.shape == (B, N, H * d) and got.values.dtype == expected.values.dtype == dtype
    assert got.scales.shape == expected.scales.shape == ((H, B * N) if scale is None else (1, 1))
    assert_close(got.scales, expected.scales, dtype=q.dtype)
    exact = attention_reference(q.double(), k.double(), v.double(), options.get("scale")).flatten(2)
    assert_as_accurate(dequantize(got), dequantize(expected), exact, factor=1.1)


@QUANTIZED
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [c for c in cases.ATTENTION if c["L"] < 500], ids=str)
def test_quantized(case, dtype, format, out_scale, device):
    q, k, v = (t.to(dtype) for t in make_inputs(**case, packed=True, device=device).values())
    assert_quantized(q, k, v, format, out_scale, device)


def some_queries(config):
    return 70 if config["BLOCK_M"] > 16 else 2


@QUANTIZED
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@where(lambda config: config in configs(FP16, some_queries(config), 198, 64))
def test_quantized_in_every_configuration(config, format, out_scale, device):
    N = some_queries(config)
    inputs = make_inputs(1, 2, N, 198, 64, packed=True, device=device)
    q, k, v = (t.half() for t in inputs.values())
    with _tuned.forced("attention", {"implementation": "triton", **config}):
        assert_quantized(q, k, v, format, out_scale, device)


def test_quantized_in_fp32_with_any_strides_and_scales(device):
    """d = 80 is padded to 128 features; the padding must not count in a row's largest value."""
    inputs = make_inputs(2, 2, 20, 20, 80, device=device)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs.values()]
    assert_quantized(*views, "int8", None, device, scale=-0.3)
    table = {"implementation": "torch"}  # only the kernels quantize
    with simulate_device(Chip("H200", (9, 0), 4)), _tuned.forced("attention", table):
        assert_quantized(*views, "fp8", None, device)


@QUANTIZED
def test_quantized_nan_stays_in_its_head_and_row(format, out_scale, device):
    """Not with "torch": PyTorch's CPU attention turns such a row into zeros.

    Rows of zeros have a positive scale.
    """
    scale = None if out_scale is None else torch.full((1, 1), out_scale, device=device)
    call = partial(attention_quantized, format=format, out_scale=scale, implementation="triton")
    inputs = make_inputs(2, 2, 9, 9, 32, device=device)
    clean = call(**inputs)
    inputs["q"][0, 4, 1, 3] = torch.nan
    o = call(**inputs)
    hit = torch.zeros(2, 9, 2, 32, dtype=bool, device=device)
    hit[0, 4, 1] = True
    hit = hit.flatten(2)
    assert torch.equal(dequantize(o).isnan(), hit)
    assert torch.equal(dequantize(o)[~hit], dequantize(clean)[~hit])
    assert not o.scales.isnan().any() and (o.scales > 0).all()
    zeros = call(**inputs | {"q": inputs["k"], "v": torch.zeros_like(inputs["v"])})
    assert (dequantize(zeros) == 0.0).all() and (zeros.scales > 0).all()


def test_quantized_saturates_beyond_out_scale(device):
    inputs = make_inputs(1, 2, 9, 9, 32, device=device)
    scale = torch.full((1, 1), 1e-4, device=device)
    for implementation in ("triton", "torch"):
        o = attention_quantized(**inputs, out_scale=scale, implementation=implementation)
        beyond = attention_reference(**inputs).flatten(2).abs() > 0.05
        assert beyond.any() and (o.values.float().abs()[beyond] == 448.0).all()


@QUANTIZED
def test_quantized_op_contract(format, out_scale, device):
    q, k, v = make_inputs(1, 2, 5, 7, 32, device=device).values()
    scale = None if out_scale is None else torch.full((1, 1), out_scale, device=device)
    torch.library.opcheck(_fwd.op, (q, k, v, 0.2, FORMATS[format], scale, None))

    def f(q, k, v):
        made = attention_quantized(q.cos(), k, v, None, format, scale, implementation="triton")
        return dequantize(made).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v), f(q, k, v))
    made = attention_quantized(
        *(t.to("meta") for t in (q, k, v)), format=format,
        out_scale=None if scale is None else scale.to("meta"), implementation="triton",
    )  # fmt: skip
    assert made.values.is_meta and made.values.shape == (1, 5, 64)
    assert made.scales.shape == ((2, 5) if scale is None else (1, 1))


def in_fp8(case, device, scale=0.02):
    """q, k and v quantized to FP8, and their per-tensor scale."""
    inputs = make_inputs(**case, packed=True, device=device)
    values = {name: round_reference(t / scale, FORMATS["fp8"]) for name, t in inputs.items()}
    return values, torch.full((1, 1), scale, device=device)


@pytest.mark.parametrize("out_scale", [None, 0.02])
@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_fp8_operands(case, out_scale, device):
    """Softmax weights and result are rounded to e4m3, by 2^-4 of a number at most, 0.026 on average.

    A tenth more than both is allowed. The reference rounds once; with the few numbers of a single
    query that is up to 0.035 in forty draws.
    """
    values, scale = in_fp8(case, device)
    given = None if out_scale is None else torch.full((1, 1), out_scale, device=device)
    exact = attention_reference(*(t.double() * 0.02 for t in values.values()), scale=0.3).flatten(2)
    once = 0.041 if case["N"] == 1 else 0.03
    for implementation, allowed in (("triton", 0.041), ("torch", once)):
        o = attention_quantized(
            **values, scale=0.3, in_scale=scale, out_scale=given, implementation=implementation
        )
        assert o.values.shape == exact.shape and o.values.dtype == FORMATS["fp8"]
        assert_within(dequantize(o), exact, allowed)


def test_fp8_operands_with_strides_nan_and_small_weights(device):
    """Small softmax weights still contribute, because the kernel multiplies p by 256.

    A thousandth of the largest weight is then a normal number of e4m3.
    """
    case = {"B": 1, "H": 2, "N": 9, "L": 90, "d": 32}
    values, scale = in_fp8(case, device)
    call = partial(attention_quantized, in_scale=scale, implementation="triton")
    clean = call(**values)
    strided = {k: t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in values.items()}
    assert torch.equal(call(**strided).values.float(), clean.values.float())
    values["q"][0, 4, 1, 3] = torch.nan
    hit = torch.zeros(1, 9, 2, 32, dtype=bool, device=device)
    hit[0, 4, 1] = True
    assert torch.equal(dequantize(call(**values)).isnan(), hit.flatten(2))
    q, k, v = (torch.zeros(1, 90, 1, 32, device=device) for _ in range(3))
    q[..., 0], k[:, 1:, :, 0], v[:, 1:] = 1.0, -1.0, 100.0  # the first key outweighs the others
    values = [round_reference(t, FORMATS["fp8"]) for t in (q, k, v)]
    one = torch.ones(1, 1, device=device)
    o = attention_quantized(*values, scale=3.5, in_scale=one, implementation="triton")
    exact = attention_reference(*(t.double() for t in values), scale=3.5).flatten(2)
    assert 5 < exact.min()
    assert_within(dequantize(o), exact, 0.07)  # a sum of rounded small weights


def test_fp8_operands_that_do_not_fit(device):
    values, scale = in_fp8({"B": 1, "H": 2, "N": 5, "L": 7, "d": 32}, device)
    halves = {name: t.half() for name, t in values.items()}
    for inputs, options, error, message in (
        (values, {}, TypeError, "q has dtype torch.float8_e4m3fn, expected"),
        (halves, {"in_scale": scale}, TypeError, "in_scale with a q of torch.float16"),
        (values, {"in_scale": scale, "format": "int8"}, TypeError, "format 'int8', expected"),
        (values, {"in_scale": scale[0]}, ValueError, r"in_scale has shape \(1,\)"),
        (values, {"in_scale": scale, "scale": -1.0}, ValueError, "scale -1.0 with in_scale"),
        (values | {"k": halves["k"]}, {"in_scale": scale}, TypeError, "k has dtype torch.float16"),
    ):
        for implementation in ("triton", "torch"):
            with pytest.raises(error, match=message):
                attention_quantized(**inputs, **options, implementation=implementation)
    with torch.autocast(device, FP16):  # autocast leaves quantized operands alone
        o = attention_quantized(**values, in_scale=scale, implementation="triton")
    plain = attention_quantized(**values, in_scale=scale, implementation="triton")
    assert torch.equal(o.values.float(), plain.values.float())
    torch.library.opcheck(
        _fwd.op, (*values.values(), 0.2, FORMATS["fp8"], None, scale),
        test_utils=("test_faketensor", "test_autograd_registration"),  # PyTorch has no e4m3 matmul here
    )  # fmt: skip


def test_quantized_bad_input_is_named(device):
    q, k, v = make_inputs(1, 2, 5, 7, 32, device=device).values()
    one = torch.ones(1, 1, device=device)
    for implementation in ("auto", "triton", "torch"):
        for arguments, options, error, message in (
            ((q.double(), k, v), {}, TypeError, "attention_quantized: q has dtype torch.float64"),
            ((q, k.half(), v), {}, TypeError, "k has dtype torch.float16, expected torch.float32"),
            ((q, k, v[:, :5]), {}, ValueError, r"v has shape \(1, 5, 2, 32\), expected"),
            (
                (q, k, v),
                {"format": "e5m2"},
                ValueError,
                "attention_quantized: format 'e5m2', expected",
            ),
            (
                (q, k, v),
                {"format": "int8", "out_scale": one},
                ValueError,
                "expected 'fp8': int8 could",
            ),
            ((q, k, v), {"out_scale": one[0]}, ValueError, r"out_scale has shape \(1,\), expected"),
            ((q, k, v), {"out_scale": one.half()}, TypeError, "out_scale has dtype torch.float16"),
        ):
            with pytest.raises(error, match=message):
                attention_quantized(*arguments, **options, implementation=implementation)
