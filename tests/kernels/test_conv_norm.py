"""conv_norm against fp64: GEMMs, depthwise and other convolutions, and their epilogues."""

from functools import partial

import pytest
import torch
from checking import DOT_DTYPES, FP16, FP32, NO_CODE, assert_close, check
from tiers import slow

from deit_fast.kernels import cases, conv_norm
from deit_fast.kernels import conv_norm_reference as reference
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import conv_norm_inputs as make_inputs
from deit_fast.kernels.conv_norm import _fwd

triton_conv_norm = partial(conv_norm, implementation="triton")
DEPTHWISE, POINTWISE = cases.CONV_NORM[2], cases.CONV_NORM[1]


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CONV_NORM, ids=str)
def test_no_less_accurate_than_torch(case, dtype, device):
    check(triton_conv_norm, reference, make_inputs(**case, device=device), dtype, grads=False)


@pytest.mark.parametrize("case", [cases.CONV_NORM[i] for i in (1, 3, 5)], ids=str)
def test_on_a_chip_without_tensor_cores(case, device):
    """cuBLAS runs the GEMMs there."""
    with simulate_device(Chip("V100", (7, 0), 80)):
        check(conv_norm, reference, make_inputs(**case, device=device), FP16, grads=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", [DEPTHWISE, POINTWISE, cases.CONV_NORM[5]], ids=str)
def test_memory_formats(case, device):
    """The result is channels_last, whatever the input is."""
    inputs = make_inputs(**case, device=device)
    expected = reference(**inputs)
    for layout in (torch.contiguous_format, torch.channels_last):
        for name in {"x", "residual"} & inputs.keys():
            inputs[name] = inputs[name].contiguous(memory_format=layout)
        got = triton_conv_norm(**inputs)
        assert_close(got, expected)
        assert got.is_contiguous(memory_format=torch.channels_last)
    inputs["x"] = inputs["x"].transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(triton_conv_norm(**inputs), expected)


@pytest.mark.parametrize("case", [DEPTHWISE, POINTWISE], ids=str)
def test_gradients_are_pytorchs(case, device):
    inputs = make_inputs(**case, device=device)
    check(triton_conv_norm, reference, inputs, FP32, no_grad=("mean", "var"))


def test_nan_stays_where_it_is_read(device):
    inputs = make_inputs(**DEPTHWISE, device=device)
    inputs["x"][1, 7, 4, 5] = float("nan")
    nan = triton_conv_norm(**inputs).isnan()
    assert nan[1, 7, 3:6, 4:7].all() and nan.sum() == 9


def test_autocast(device):
    for case in (DEPTHWISE, POINTWISE):
        inputs = make_inputs(**case, device=device)
        with torch.autocast(device, FP16):
            got = triton_conv_norm(**inputs)
        expected = reference(**inputs)
        assert got.dtype == FP16
        assert_close(got.float(), expected, dtype=FP16)


@pytest.mark.parametrize("case", [slow(DEPTHWISE), POINTWISE, cases.CONV_NORM[5]], ids=str)
def test_opcheck(case, device):
    inputs = make_inputs(**case, device=device)
    tensors = [inputs[n] for n in ("x", "weight", "norm_weight", "norm_bias", "mean", "var")]
    rest = [inputs[n] for n in ("stride", "padding", "groups", "activation")]
    residual = inputs.get("residual")
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(_fwd.op, (*tensors, residual, 1e-5, *rest, "triton"))


@pytest.mark.parametrize("case", [slow(DEPTHWISE), POINTWISE], ids=str)
def test_compiles(case, device):
    inputs = make_inputs(**case, device=device)
    compiled = torch.compile(lambda: triton_conv_norm(**inputs), fullgraph=True, backend=NO_CODE)
    with torch.no_grad():
        assert_close(compiled(), triton_conv_norm(**inputs))


def test_errors(device):
    inputs = make_inputs(**DEPTHWISE, device=device)
    x, weight = inputs["x"], inputs["weight"]
    for bad, error, says in (
        ({"x": x[0]}, ValueError, r"x has shape \(48, 14, 11\)"),
        ({"x": x[:, :40]}, ValueError, "40 channels of 14 x 11 to 48 in 48 groups"),
        ({"stride": 0}, ValueError, "stride 0"),
        ({"padding": -1}, ValueError, "padding -1"),
        ({"groups": 16}, ValueError, r"weight has shape \(48, 1, 3, 3\), expected \(48, 3, 3, 3\)"),
        ({"mean": inputs["mean"][:3]}, ValueError, r"mean has shape \(3,\), expected \(48,\)"),
        ({"residual": x[:, :, 1:]}, ValueError, r"residual has shape \(2, 48, 13, 11\)"),
        ({"activation": "relu"}, ValueError, "activation 'relu'"),
        ({"weight": weight.half()}, TypeError, "weight has dtype torch.float16"),
    ):
        with pytest.raises(error, match=says):
            triton_conv_norm(**(inputs | bad))
