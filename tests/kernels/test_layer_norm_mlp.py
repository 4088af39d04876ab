"""layer_norm_mlp as one operation against fp64."""

from functools import partial

import pytest
import torch
from checking import DOT_DTYPES, FP16, FP32, assert_as_accurate, check, check_compiles

from deit_fast.kernels import cases, layer_norm_mlp, layer_norm_mlp_reference
from deit_fast.kernels.cases import layer_norm_mlp_inputs as make_inputs

triton_layer_norm_mlp = partial(layer_norm_mlp, implementation="triton")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
@pytest.mark.parametrize("case", cases.LAYER_NORM_MLP, ids=str)
def test_no_less_accurate_than_torch(case, scales, dtype, device):
    inputs = make_inputs(**case, scales=scales, device=device)
    check(triton_layer_norm_mlp, layer_norm_mlp_reference, inputs, dtype)


def test_autocast_keeps_the_stream_in_fp32(device):
    inputs = make_inputs(12, 2, 64, 128, device=device)
    exact = layer_norm_mlp_reference(**{k: t.double() for k, t in inputs.items()})
    with torch.autocast(device, FP16):
        got, torchs = triton_layer_norm_mlp(**inputs), layer_norm_mlp_reference(**inputs)
    assert got.dtype == torchs.dtype == FP32
    assert_as_accurate(got, torchs, exact)


def test_compiles_into_one_graph(device):
    leaves = make_inputs(6, 2, 32, 48, False, device).values()

    def f(*args):
        return triton_layer_norm_mlp(*args[:7], residual=args[7]).cos()

    check_compiles(f, leaves)


def test_bad_input_is_named():
    inputs = make_inputs(6, 2, 32, 48)
    with pytest.raises(ValueError, match=r"weight has shape \(31,\), want \(32,\)"):
        layer_norm_mlp(**inputs | {"norm_weight": torch.zeros(31)})
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 32\), want \(2, 3, 31\)"):
        layer_norm_mlp(**inputs | {"fc1_weight": torch.zeros(48, 31)})
