"""quantize against its definition: dequantized values are within half a step of the input."""

import sys
from functools import partial

import pytest
import torch
from checking import FP32, ROW_DTYPES, assert_at_most, assert_close

from deit_fast.kernels import (
    Quantized,
    _policy,
    attention_quantized,
    cases,
    dequantize,
    quantize,
    quantize_reference,
)
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import quantize_inputs as make_inputs
from deit_fast.kernels.quantize import (
    FORMATS,
    LIMITS,
    TINY,
    _fwd,
    quantize_statically_reference,
)

triton_quantize = partial(quantize, implementation="triton")
BOTH = pytest.mark.parametrize("implementation", ["triton", "torch"])
FORMAT = pytest.mark.parametrize("format", FORMATS)


def steps(q):
    """From each value to the next, times its scale, at most: in fp64."""
    scale = dequantize(Quantized(torch.ones_like(q.values, dtype=FP32), q.scales)).double()
    if q.values.dtype == torch.int8:
        return scale
    return scale * (q.values.double().abs() * 2.0**-3).clamp_min(2.0**-9)


def assert_rounds_to_nearest(q, x):
    """... up to fp32's rounding of up to 127 steps."""
    assert ((dequantize(q).double() - x.double()).abs() <= steps(q) * 0.50003).all()


def assert_same_but_for_ties(got, expected):
    """1 / scale is rounded before it multiplies: a value close to the middle of two may go either
    way, so one step, and seldom."""
    assert got.values.dtype == expected.values.dtype and got.scales.shape == expected.scales.shape
    assert_close(got.scales, expected.scales)
    if got.values.numel():
        apart = (got.values.float() - expected.values.float()).abs()
        assert (
            apart <= steps(Quantized(expected.values, torch.ones(1, 1, device=apart.device)))
        ).all()
        assert_at_most((apart > 0).float().mean().item(), 0.01, "share of ties")


@FORMAT
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.QUANTIZE, ids=str)
def test_round_trip(case, dtype, format, device):
    inputs = make_inputs(**case, format=format, device=device)
    inputs["x"] = inputs["x"].to(dtype)
    q = triton_quantize(**inputs)
    assert q.values.shape == inputs["x"].shape and q.values.dtype == FORMATS[format]
    rows = inputs["x"].numel() // inputs["x"].shape[-1]
    assert q.scales.shape == (inputs["parts"], rows) and q.scales.dtype == FP32
    assert_same_but_for_ties(q, quantize_reference(**inputs))
    assert_rounds_to_nearest(q, inputs["x"])
    if q.values.numel():  # the largest of a group is the format's largest
        groups = q.values.float().abs().unflatten(-1, (inputs["parts"], -1)).amax(-1)
        assert (groups == LIMITS[q.values.dtype]).all()


@BOTH
@FORMAT
def test_rounds_ties_to_even(format, implementation, device):
    limit = LIMITS[FORMATS[format]]
    ties = [0.5, 1.5, 2.5, -2.5, 126.5] if format == "int8" else [17.0, 19.0, 21.0, -21.0, 432.0]
    expected = (
        [0.0, 2.0, 2.0, -2.0, 126.0] if format == "int8" else [16.0, 20.0, 20.0, -20.0, 448.0]
    )
    x = torch.tensor([[limit, *ties]], device=device)
    q = quantize(x, format, implementation=implementation)
    assert q.scales.item() == 1.0 and q.values[0, 1:].float().tolist()[:4] == expected[:4]
    assert q.values[0, -1].float().item() in (expected[4], 416.0)


@BOTH
@FORMAT
def test_zeros_have_a_scale(format, implementation, device):
    x = torch.zeros(3, 64, device=device)
    x[1] = -0.0
    q = quantize(x, format, 2, implementation=implementation)
    assert (q.scales == TINY).all()
    assert (dequantize(q) == 0.0).all()


@BOTH
@FORMAT
def test_subnormal_rows(format, implementation, device):
    """Below what a scale can be: to the nearest multiple of the smallest scale, or to 0."""
    x = torch.randn(4, 32, device=device)
    scale = torch.tensor([1e-36, 1e-38, 1e-42, 1.0], device=device)
    x = x * scale[:, None]
    q = quantize(x, format, implementation=implementation)
    assert (q.scales >= TINY).all() and q.scales.isfinite().all()
    assert_rounds_to_nearest(q, x)
    assert q.values[0].any() and q.values[3].any()


@BOTH
@FORMAT
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others(bad, format, implementation, device):
    """Also beside an infinity: NaN orders after it. Of several groups only the one concerned."""
    x = make_inputs((9, 192), device=device)["x"]
    clean = quantize(x, format, 3, implementation)
    x[4, 70], x[4, 71] = bad, torch.inf
    x[7, 0] = bad
    q = quantize(x, format, 3, implementation)
    hit = torch.zeros(9, 192, dtype=bool, device=device)
    hit[4, 64:128] = hit[7, :64] = True
    assert torch.equal(dequantize(q).isnan(), hit)
    assert torch.equal(q.values[~hit].float(), clean.values[~hit].float())
    groups = hit[:, ::64].t()
    assert torch.equal(q.scales[~groups], clean.scales[~groups])
    assert q.scales[groups].isinf().all()
    assert not q.scales.isnan().any() and (q.scales > 0).all()


@BOTH
@FORMAT
def test_one_huge_outlier_costs_its_own_group_only(format, implementation, device):
    x = make_inputs((5, 256), device=device)["x"]
    clean = quantize(x, format, 4, implementation)
    x[2, 100] = 3e38
    q = quantize(x, format, 4, implementation)
    assert_rounds_to_nearest(q, x)
    assert dequantize(q)[2, 100].item() == pytest.approx(3e38)
    other = torch.ones_like(x, dtype=bool)
    other[2, 64:128] = False
    assert torch.equal(q.values[other].float(), clean.values[other].float())
    assert not q.values[2, 64:100].float().any()


def test_what_a_per_tensor_scale_cannot_hold_saturates(device):
    """But for infinity, which becomes NaN. By the kernel: values of attention with one key."""
    x = torch.tensor([1e9, -1e9, 449.0, 448.0, 3.0, torch.inf, -torch.inf, torch.nan] * 4)
    scale = torch.tensor([[0.5]], device=device)
    v = x.to(device).view(1, 1, 1, 32)
    by_kernel = attention_quantized(
        v.nan_to_num(0, 0, 0), torch.zeros_like(v), v, out_scale=scale, implementation="triton"
    )
    for q in (quantize_statically_reference(v.view(1, 32), scale), by_kernel):
        found = dequantize(q).view(4, 8)[0]
        assert found[:5].tolist() == [224.0, -224.0, 224.0, 224.0, 3.0] and found[5:].isnan().all()


@FORMAT
def test_non_contiguous_input(format, device):
    x = torch.randn(40, 6, device=device).t()
    expected = quantize_reference(x.contiguous(), format, 2)
    assert_same_but_for_ties(triton_quantize(x, format, 2), expected)
    assert_same_but_for_ties(triton_quantize(x.expand(2, 6, 40)[1], format, 2), expected)
    sliced = torch.randn(6, 80, device=device)[:, ::2]
    assert_same_but_for_ties(triton_quantize(sliced, format), quantize_reference(sliced, format))


@FORMAT
def test_op_contract(format, device):
    torch.library.opcheck(_fwd.op, (torch.randn(6, 64, device=device), FORMATS[format], 2))


@FORMAT
def test_compiles_into_one_graph(format, device):
    def f(x):
        return dequantize(triton_quantize(x.cos(), format, 2)).sin()

    x = torch.randn(6, 64, device=device)
    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@BOTH
@FORMAT
def test_meta_device(format, implementation):
    q = quantize(torch.randn(3, 5, 64, device="meta"), format, 2, implementation)
    assert q.values.is_meta and q.values.shape == (3, 5, 64) and q.values.dtype == FORMATS[format]
    assert q.scales.shape == (2, 15) and dequantize(q).shape == (3, 5, 64)


def call(name, format, implementation, device, grad=True):
    """A call of each public function, with an argument that wants a gradient; that argument."""
    kernels = sys.modules["deit_fast.kernels"]
    leaf = torch.randn(4, 64, device=device, requires_grad=grad)
    if name == "quantized_linear":
        weight = quantize_reference(torch.randn(64, 64, device=device), format)
        arguments = (quantize_reference(leaf.detach(), format), weight)
        options = {"residual": leaf, "dtype": FP32}
    elif name == "layer_norm_quantized":
        arguments = (leaf.detach(), leaf[0], leaf[1])
        options = {"format": format}
    elif name == "attention_quantized":
        arguments = leaf.view(1, 4, 2, 32).expand(3, 1, 4, 2, 32).unbind()
        options = {"format": format}
    else:
        arguments, options = (leaf,), {"format": format}
    return getattr(kernels, name)(*arguments, **options, implementation=implementation), leaf


PUBLIC = ("quantize", "quantized_linear", "layer_norm_quantized", "attention_quantized")


@BOTH
@FORMAT
@pytest.mark.parametrize("name", PUBLIC)
def test_backward_raises_instead_of_losing_gradients(name, format, implementation, device):
    """Even where some of them, such as the residual's, would exist."""
    result, leaf = call(name, format, implementation, device)
    y = result if torch.is_tensor(result) else dequantize(result)
    assert y.requires_grad
    with pytest.raises(
        RuntimeError, match=f"^{name}: quantized operations are for inference, no gradient"
    ):
        y.sum().backward()
    assert leaf.grad is None
    without = call(name, format, implementation, device, grad=False)[0]
    plain = without if torch.is_tensor(without) else dequantize(without)
    assert not plain.requires_grad


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(
    "chip, format, reason",
    [
        (Chip("A100", (8, 0), 108), "fp8", r"needs compute capability 8.9; int8 needs 8.0"),
        (Chip("V100", (7, 0), 80), "int8", r"int8 on tensor cores from compute capability 8.0"),
        (Chip("V100", (7, 0), 80), "fp8", r"needs compute capability 8.9; int8 needs 8.0"),
    ],
    ids=["A100 fp8", "V100 int8", "V100 fp8"],
)
@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_a_chip_without_the_format(implementation, chip, format, reason, name, device):
    with simulate_device(chip):
        with pytest.raises(RuntimeError, match=rf"^{name}: .*{reason}, x is on a chip of"):
            call(name, format, implementation, device)
        call(name, format, "torch", device)  # PyTorch serves where it is asked for


@FORMAT
@pytest.mark.parametrize("name", PUBLIC)
def test_auto(name, format, device):
    """On a CPU PyTorch, on a chip that has the format Triton: nothing else replaces it."""
    dtype = FORMATS[format]
    for capability, expected in (
        (None, "torch"), ((7, 5), "none"), ((8, 0), "none" if format == "fp8" else "triton"),
        ((8, 9), "triton"), ((9, 0), "triton"), ((10, 0), "triton"),
    ):  # fmt: skip
        assert _policy.choose(name, capability, dtype).implementation == expected
    assert call(name, format, "auto", device, grad=False)[0] is not None


def test_bad_input_is_named():
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match=r"format 'fp4', expected one of \('fp8', 'int8'\)"):
        quantize(x, "fp4")
    for wrong, parts in ((x, 3), (x, 0), (x[0, 0], 1), (x[:, :0], 1), (torch.zeros(1, 9000), 1)):
        with pytest.raises(ValueError, match=r"parts is \d, expected \(..., K\) with K a multiple"):
            quantize(wrong, parts=parts)
    for wrong in (x.double(), x.to(torch.int8)):
        for implementation in ("auto", "torch"):
            with pytest.raises(
                TypeError, match="quantize: x has dtype .*, expected float32, float16"
            ):
                quantize(wrong, "int8", implementation=implementation)
    with pytest.raises(ValueError, match="implementation: 'cuda' for quantize"):
        quantize(x, implementation="cuda")
