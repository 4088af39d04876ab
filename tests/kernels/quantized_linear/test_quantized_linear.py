"""quantized_linear against fp64 matmuls of the dequantized operands."""

from functools import partial

import pytest
import torch
from checking import (
    BF16,
    FP16,
    FP32,
    assert_at_most,
    assert_close,
    relative_error,
    seed,
)
from selection import skip_without_tensor_descriptors, where

from deit_fast.kernels import (
    Quantized,
    _tuned,
    cases,
    dequantize,
    linear_reference,
    quantize,
    quantize_reference,
    quantized_linear,
    quantized_linear_reference,
)
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import quantized_linear_inputs
from deit_fast.kernels.linear.configs import without_tma
from deit_fast.kernels.quantize import FORMATS, LIMITS
from deit_fast.kernels.quantized_linear import GROUP_SIZE, SHORT_SUMS
from deit_fast.kernels.quantized_linear.configs import (
    AMPERE_CONFIGS,
    HOPPER_CONFIGS,
    block_k,
    configs,
    epilogue_name,
    meta,
    why_not,
)
from deit_fast.kernels.quantized_linear.op import _fwd

triton_linear = partial(quantized_linear, implementation="triton")
FORMAT = pytest.mark.parametrize("of", FORMATS)
CONFIG = pytest.mark.parametrize("config", HOPPER_CONFIGS + AMPERE_CONFIGS, ids=str)
EVERYTHING = {
    "activation": "gelu", "residual": True, "layer_scale": True, "row_scale": True, "dtype": FP16,
}  # fmt: skip
EPILOGUES = {
    "plain": {"bias": False, "dtype": FP32},
    "bias": {"dtype": FP16},
    "gelu": {"activation": "gelu", "dtype": FP16},
    "residual": {"residual": True, "dtype": FP16},  # in fp32: so is the result
    "everything": EVERYTHING,
}
H9000, A9000 = Chip("NVIDIA H9000", (9, 0), 4), Chip("NVIDIA A9000", (8, 9), 4)


def make_inputs(**options):
    """No row_scale of zeros alone, which would hide the matmul."""
    made = quantized_linear_inputs(**options)
    if "row_scale" in made:
        S = made["row_scale"].shape[0]
        made["row_scale"] = torch.arange(S, device=made["row_scale"].device) % 3 + 0.5
    return made


def exactly(x, weight, dtype=None, format=None, out_scale=None, **rest):
    """In fp64, not rounded."""
    rest = {k: t.double() if torch.is_tensor(t) else t for k, t in rest.items()}
    return linear_reference(dequantize(x).double(), dequantize(weight).double(), **rest)


def assert_as_accurate(got, inputs, what=""):
    """At most twice the error of the reference, which computes in fp32 and rounds once.

    FP8 on sm_90 accumulates with fewer bits.
    """
    expected, true = quantized_linear_reference(**inputs), exactly(**inputs)
    if isinstance(expected, Quantized):
        assert (
            got.values.dtype == expected.values.dtype and got.scales.shape == expected.scales.shape
        )
        got, expected = dequantize(got), dequantize(expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert not got.isnan().any()
    if not true.numel():
        return
    fewer_bits = got.is_cuda and inputs["x"].values.dtype == torch.float8_e4m3fn
    allowed = 2 * relative_error(expected, true) + (
        SHORT_SUMS if fewer_bits else 4 * torch.finfo(FP32).eps
    )
    assert_at_most(relative_error(got, true), allowed, what)


@FORMAT
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("case", cases.QUANTIZED_LINEAR, ids=str)
def test_as_accurate_as_the_reference(case, epilogue, of, device):
    inputs = make_inputs(**case, **EPILOGUES[epilogue], of=of, device=device)
    if epilogue == "everything" and device == "cuda":
        inputs["dtype"] = BF16
    assert_as_accurate(triton_linear(**inputs), inputs)


@FORMAT
@pytest.mark.parametrize(
    "case", [c for c in cases.QUANTIZED_LINEAR if c["N"] % GROUP_SIZE == 0], ids=str
)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_quantized_result(case, activation, of, device):
    inputs = make_inputs(**case, activation=activation, of=of, format=of, device=device)
    got = triton_linear(**inputs)
    assert got.scales.shape == (case["N"] // GROUP_SIZE, case["M"])
    assert_as_accurate(got, inputs)
    if case["M"]:  # a scale of its own for each row and 64 columns: the largest is the format's
        groups = got.values.float().abs().unflatten(-1, (-1, GROUP_SIZE)).amax(-1)
        assert (groups == LIMITS[got.values.dtype]).all()
        close = (dequantize(got) - exactly(**inputs)).abs() <= got.scales.t().reshape(
            *got.values.shape[:-1], -1, 1
        ).expand(*got.values.shape[:-1], -1, GROUP_SIZE).flatten(-2) * (
            16.01 if of == "fp8" else 0.51
        )
        assert close.all()


@pytest.mark.parametrize("case", cases.QUANTIZED_LINEAR, ids=str)
def test_per_tensor_scales_of_x_and_of_the_result(case, device):
    """FP8: also with widths that are no multiple of 64."""
    case = {k: v for k, v in case.items() if k != "parts"} | {"scale": 0.01, "device": device}
    inputs = make_inputs(**case, activation="gelu", format="fp8", out_scale=0.02)
    got = triton_linear(**inputs)
    assert got.scales is inputs["out_scale"]
    assert_as_accurate(got, inputs)
    assert_as_accurate(triton_linear(**(i := make_inputs(**case, **EVERYTHING))), i)


def a_table_may_name(config, kind):
    shape = {"epilogue": kind.replace(" ", "_")}
    choice = {"implementation": "triton", **config}
    return not why_not(shape, choice, (9, 0) if config in HOPPER_CONFIGS else (8, 0))


@CONFIG
@FORMAT
@pytest.mark.parametrize("kind", ["per row", "parts", "own scales", "per tensor"])
@where(lambda kind, of: (kind, of) != ("per tensor", "int8"))  # int8 could not say NaN
@where(lambda kind, config: a_table_may_name(config, kind))
def test_every_configuration_a_table_may_name(kind, of, config, device):
    skip_without_tensor_descriptors(config, device)
    options = {
        "per row": EVERYTHING, "parts": EVERYTHING | {"parts": 3}, "own scales": {"format": of},
        "per tensor": {"scale": 0.01, "format": "fp8", "out_scale": 0.02},
    }[kind]  # fmt: skip
    choice = {"implementation": "triton", **config}
    M = config["BLOCK_M"] + 6
    inputs = make_inputs(M=M, S=2, K=192, N=192, of=of, device=device, **options)
    with _tuned.forced("quantized_linear", choice):
        assert_as_accurate(triton_linear(**inputs), inputs)


@FORMAT
@pytest.mark.parametrize("chip", [H9000, A9000], ids=lambda chip: chip.name)
@pytest.mark.parametrize("parts, N", [(1, 256), (1, 192), (3, 256), (1, 40)], ids=str)
def test_what_the_rule_takes(parts, N, chip, of, device):
    if device == "cuda" and torch.cuda.get_device_capability() < chip.capability:
        pytest.skip("GPU: another chip's configurations")
    inputs = make_inputs(M=520, S=1, K=96, N=N, parts=parts, of=of, dtype=FP32, device=device)
    with simulate_device(chip):
        assert_as_accurate(triton_linear(**inputs), inputs)


def test_rule():
    """The wide tile where it leaves no column idle, unless groups need a second accumulator; the
    small one where the others leave SMs idle, unless it is narrower than a group."""
    for chip in ((8, 0), (8, 9), (9, 0), (10, 0)):
        wide, narrow, small = configs(chip)[:3]
        assert meta(50_688, 1152, chip, 132) == meta(50_688, 768, chip, 132) == wide
        assert meta(50_688, 192, chip, 132) == meta(50_688, 384, chip, 132, groups=True) == narrow
        assert meta(10, 384, chip, 132) == meta(10, 384, chip, 132, groups=True) == small
        assert meta(10, 384, chip, 132, own_scales=True) == narrow
    assert configs((8, 9)) == configs((8, 0)) == AMPERE_CONFIGS
    wide, narrow, small, *_ = HOPPER_CONFIGS
    assert [block_k(narrow, width) for width in (64, 32, 96, 256)] == [64, 32, 32, 128]
    for config in HOPPER_CONFIGS:
        without = without_tma(config, HOPPER_CONFIGS)
        assert without in HOPPER_CONFIGS and not without["TMA"]
        assert without["BLOCK_N"] == min(config["BLOCK_N"], 128)


def test_a_table_may_not_name_what_spills_or_cannot_be():
    wide, narrow, small = ({"implementation": "triton", **c} for c in HOPPER_CONFIGS[:3])
    shape = {"M": 8, "K": 64, "N": 64, "dtype": "fp8"}
    parts = epilogue_name(True, "none", True, True, False, False, False)
    own = epilogue_name(False, "gelu", True, False, False, True, True)
    assert (parts, own) == ("parts+bias+residual", "bias+gelu+quantized+own_scales")
    for choice, epilogue, problem in (
        (wide, parts, "second accumulator spills"), (narrow, parts, None), (small, parts, None),
        (wide, own, None), (narrow, own, None), (small, own, "narrower than the 64 columns"),
        ({"implementation": "cublas"}, own, "implementation 'cublas', expected one of"),
        (narrow | {"num_warps": 2}, own, "does not offer"),
    ):  # fmt: skip
        said = why_not(shape | {"epilogue": epilogue}, choice, (9, 0))
        assert said is None if problem is None else problem in said


@FORMAT
def test_int8_is_exact_and_fp8_nearly(of, device):
    """Whole numbers, of which fp32 holds every sum: no error at all, whatever the order."""
    seed(0)
    x, w = (torch.randint(-8, 9, (n, 160), device=device).float() for n in (70, 72))
    one = [torch.ones(1, n, device=device) for n in (70, 72)]
    operands = [Quantized(t.to(FORMATS[of]), s) for t, s in zip((x, w), one, strict=True)]
    got = triton_linear(*operands, dtype=FP32)
    assert torch.equal(got, x @ w.t())


@FORMAT
@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(bad, parts, implementation, of, device):
    """Through a layer with a quantized result and one with a float result."""
    seed(0)
    x = torch.randn(20, 128, device=device)
    weight, back = (
        quantize_reference(torch.randn(s, device=device), of) for s in ((128, 128), (40, 128))
    )

    def both(x):
        hidden = quantized_linear(
            quantize(x, of, parts, implementation), weight, activation="gelu", format=of,
            implementation=implementation,
        )  # fmt: skip
        assert not hidden.scales.isnan().any() and (hidden.scales > 0).all()
        return quantized_linear(hidden, back, dtype=FP32, implementation=implementation)

    clean = both(x)
    x[7, 100] = bad
    y = both(x)
    rest = [i for i in range(20) if i != 7]
    assert y[7].isnan().all()
    assert torch.equal(y[rest], clean[rest])


def test_nan_in_values_with_a_per_tensor_scale(device):
    """e4m3 says NaN itself; what is too large saturates."""
    seed(0)
    weight = quantize_reference(torch.randn(64, 64, device=device), "fp8")
    x = Quantized(
        torch.randn(5, 64, device=device).to(FORMATS["fp8"]), torch.ones(1, 1, device=device)
    )
    x.values[3, 1] = torch.nan
    tiny = torch.full((1, 1), 1e-3, device=device)
    q = triton_linear(x, weight, format="fp8", out_scale=tiny)
    rest = [0, 1, 2, 4]
    assert dequantize(q)[3].isnan().all() and not dequantize(q)[rest].isnan().any()
    largest = dequantize(q)[rest].abs().max().item()
    assert largest == pytest.approx(0.448) and exactly(x, weight)[rest].abs().max() > 1


def test_operands_that_tensor_descriptors_cannot_address(device):
    """A base that is not a multiple of 16 bytes, and rows that are not."""
    seed(0)
    flat = torch.randint(-127, 128, (40 * 96 + 1,), device=device, dtype=torch.int8)
    weight = torch.randint(-127, 128, (128, 96), device=device, dtype=torch.int8)
    one = torch.ones(1, 40, device=device), torch.ones(1, 128, device=device)
    for i, config in enumerate(HOPPER_CONFIGS):
        skip_without_tensor_descriptors(config, device)
        K, start = (96, 1) if i % 2 else (90, 0)
        x, w = flat[start : start + 40 * K].view(40, K), weight[:, :K]
        with _tuned.forced("quantized_linear", {"implementation": "triton", **config}):
            got = triton_linear(Quantized(x, one[0]), Quantized(w, one[1]), dtype=FP32)
        assert torch.equal(got, x.float() @ w.float().t())


@FORMAT
def test_non_contiguous_operands(of, device):
    inputs = make_inputs(M=24, S=2, K=96, N=64, parts=3, of=of, device=device, **EVERYTHING)
    expected = triton_linear(**inputs)
    for name in ("x", "weight"):
        values, scales = inputs[name]
        wide = torch.stack([values.view(torch.int8)] * 2, -1).view(values.dtype)[..., 0]
        inputs[name] = Quantized(wide, scales.repeat_interleave(2, 1)[:, ::2])
        assert not wide.is_contiguous()
    for name in ("bias", "layer_scale", "residual"):
        inputs[name] = inputs[name].repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(triton_linear(**inputs), expected)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_autocast_changes_nothing(implementation, device):
    inputs = make_inputs(M=6, S=2, K=64, N=48, dtype=FP32, device=device)
    expected = quantized_linear(**inputs, implementation=implementation)
    with torch.autocast(device, BF16):
        got = quantized_linear(**inputs, implementation=implementation)
    assert torch.equal(got, expected)


def arguments(of, device, **options):
    """The operator's arguments."""
    inputs = make_inputs(M=6, S=2, K=96, N=64, parts=3, of=of, device=device, **options)
    x, weight = inputs["x"], inputs["weight"]
    optional = (inputs.get(k) for k in ("bias", "residual", "layer_scale", "row_scale"))
    bias, residual, layer_scale, row_scale = optional
    residual = None if residual is None else residual.view(6, 64)
    dtype = FORMATS[of] if inputs.get("format") else FP16
    return (
        x.values.view(6, 96), x.scales, weight.values, weight.scales, bias, residual, layer_scale,
        row_scale, inputs.get("out_scale"), inputs["activation"], dtype,
    )  # fmt: skip


def opcheck(arguments):
    """torch's, less the check that arguments stay unchanged: it multiplies them, which PyTorch
    cannot do in e4m3."""
    left_out = arguments[0].dtype == torch.float8_e4m3fn
    checks = ("test_schema", "test_autograd_registration", "test_faketensor",
              "test_aot_dispatch_dynamic")  # fmt: skip
    torch.library.opcheck(_fwd.op, arguments, test_utils=checks[left_out:])


@FORMAT
def test_op_contract(of, device):
    opcheck(arguments(of, device, **EVERYTHING))
    opcheck(arguments(of, device, format=of))


def test_op_contract_with_a_per_tensor_scale(device):
    opcheck(arguments("fp8", device, format="fp8", out_scale=0.02))


@FORMAT
def test_compiles_into_one_graph(of, device):
    inputs = make_inputs(M=6, S=2, K=64, N=64, activation="gelu", of=of, format=of, device=device)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]

    def f(values, scales, bias):
        hidden = triton_linear(Quantized(values, scales), weight, bias.cos(), format=of)
        return triton_linear(hidden, weight, bias, dtype=FP32).sin()

    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*x, bias)
    assert_close(got, f(*x, bias))


@FORMAT
def test_meta_device(of):
    """Shapes and dtypes as on a device, for either implementation."""
    for options in (EVERYTHING | {"parts": 3}, {"format": of}):
        inputs = make_inputs(M=6, S=2, K=96, N=64, of=of, device="meta", **options)
        got, expected = triton_linear(**inputs), quantized_linear_reference(**inputs)
        for a, b in zip(got, expected, strict=True) if "format" in options else ((got, expected),):
            assert a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_bad_input_is_named(device):
    inputs = make_inputs(M=6, S=2, K=96, N=64, parts=3, of="int8", device=device)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    fp8 = quantize_reference(torch.zeros(6, 96, device=device), "fp8")
    one = torch.ones(1, 1, device=device)

    def refuse(error, message, *args, **kwargs):
        for implementation in ("auto", "triton", "torch"):
            with pytest.raises(error, match=message):
                quantized_linear(*args, **kwargs, implementation=implementation)

    refuse(TypeError, "x is a Tensor, expected a Quantized", x.values, weight)
    refuse(TypeError, "weight is a Tensor, expected a Quantized", x, weight.values)
    refuse(TypeError, "weight has values of torch.float32 and scales", x, Quantized(one, one))
    refuse(TypeError, "weight has torch.float8_e4m3fn, expected x's torch.int8", x, fp8)
    refuse(ValueError, r"weight has values of shape \(64, 90\), expected \(..., 96\)", x,
           quantize_reference(torch.zeros(64, 90, device=device), "int8"))  # fmt: skip
    refuse(ValueError, r"weight has shape \(64, 96\) and scales \(3, 64\), expected \(N, 96\)", x,
           quantize_reference(torch.zeros(64, 96, device=device), "int8", 3))  # fmt: skip
    refuse(ValueError,
           r"x has scales of shape \(1, 5\) for values of \(2, 3, 96\), expected \(P, 6\)",
           Quantized(x.values, x.scales[:1, :5]), weight)  # fmt: skip
    refuse(ValueError, r"scales of shape \(1, 1\).* or \(1, 1\) with fp8",
           Quantized(x.values, one), weight)  # fmt: skip
    refuse(ValueError, "x has groups of 16 features, expected a multiple of 32",
           quantize_reference(torch.zeros(2, 96, device=device), "int8", 6), weight)  # fmt: skip
    refuse(ValueError, r"bias has shape \(5,\), expected \(64,\)", x, weight, bias[:5], dtype=FP16)
    refuse(ValueError, r"residual has shape \(6, 64\), expected \(2, 3, 64\)", x, weight,
           residual=torch.zeros(6, 64, device=device), dtype=FP16)  # fmt: skip
    refuse(ValueError, r"row_scale has shape \(3,\), expected \(2,\)", x, weight,
           row_scale=bias[:3], dtype=FP16)  # fmt: skip
    refuse(ValueError, "activation 'relu', expected one of", x, weight, activation="relu")
    refuse(TypeError, "dtype None, expected float32, float16 or bfloat16", x, weight)
    refuse(TypeError, "dtype torch.float64, expected float32", x, weight, dtype=torch.float64)
    refuse(ValueError, "format 'fp4', expected one of", x, weight, format="fp4")
    refuse(ValueError, "format 'int8' with a dtype, residual", x, weight, format="int8", dtype=FP16)
    refuse(ValueError, "out_scale with format 'int8', expected 'fp8'", x, weight, format="int8",
           out_scale=one)  # fmt: skip
    refuse(ValueError, "out_scale with format None", x, weight, dtype=FP16, out_scale=one)
    weight8 = quantize_reference(torch.zeros(64, 96, device=device), "fp8")
    refuse(ValueError, r"out_scale has shape \(1,\), expected \(1, 1\)", fp8, weight8, format="fp8",
           out_scale=one[0])  # fmt: skip
    refuse(TypeError, "out_scale has dtype torch.float16", fp8, weight8, format="fp8",
           out_scale=one.half())  # fmt: skip
    refuse(ValueError, "40 features in 'fp8', expected a multiple of 64", fp8,
           Quantized(weight8.values[:40], weight8.scales[:, :40]), format="fp8")  # fmt: skip
    with pytest.raises(ValueError, match="implementation: 'cublas' for quantized_linear"):
        quantized_linear(x, weight, dtype=FP16, implementation="cublas")
