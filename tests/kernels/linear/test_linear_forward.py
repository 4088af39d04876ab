"""linear and its epilogues against fp64, as one Triton kernel and after a cuBLAS matmul."""

from functools import partial

import pytest
import torch
from checking import (
    DOT_DTYPES,
    FP16,
    FP32,
    HALVES,
    assert_as_accurate,
    assert_at_most,
    assert_close,
    assert_equal,
    check,
    seed,
)
from selection import skip_without_tensor_descriptors, where

from deit_fast.kernels import _tuned, cases, linear, linear_reference
from deit_fast.kernels.cases import linear_inputs as make_inputs
from deit_fast.kernels.linear.configs import AMPERE_CONFIGS, HOPPER_CONFIGS

triton_linear = partial(linear, implementation="triton")
EVERYTHING = {"activation": "gelu", "residual": True, "layer_scale": True, "row_scale": True}
EPILOGUES = {
    "plain": {"bias": False},
    "bias": {},
    "gelu": {"activation": "gelu"},
    "residual": {"residual": True},
    "everything": EVERYTHING,
}
CONFIG = pytest.mark.parametrize("config", HOPPER_CONFIGS + AMPERE_CONFIGS, ids=str)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    "case, implementation",
    [(case, "triton") for case in cases.LINEAR] + [(case, "cublas") for case in cases.LINEAR[2:]],
    ids=str,
)
def test_no_less_accurate_than_torch(case, epilogue, implementation, dtype, device):
    inputs = make_inputs(**case, **EPILOGUES[epilogue], device=device)
    check(partial(linear, implementation=implementation), linear_reference, inputs, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [(300, 192, 320), (130, 72, 200)], ids=["even", "uneven"])
@CONFIG
def test_every_configuration_a_table_may_name(config, case, dtype, device):
    skip_without_tensor_descriptors(config, device)
    M, K, N = case
    inputs = make_inputs(M=M, S=2, K=K, N=N, **EVERYTHING, device=device)
    with _tuned.forced("linear", {"implementation": "triton", **config}):
        check(triton_linear, linear_reference, inputs, dtype, grads=False)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@CONFIG
# cuBLAS takes no configuration; the rule chooses none narrower than what row statistics summarise
@where(lambda implementation, config: implementation == "triton" or config == HOPPER_CONFIGS[0])
@where(lambda config: config["BLOCK_N"] >= 64)
def test_row_stats_of_the_rounded_result(config, dtype, implementation, device):
    """mean and sum of squared differences of each 64 columns, also with a mean far from zero."""
    skip_without_tensor_descriptors(config, device)
    inputs = make_inputs(M=8 * 192 + 5, S=1, K=64, N=192, residual=True, device=device)
    inputs["residual"] += 30
    inputs = {k: v if k == "activation" else v.to(dtype) for k, v in inputs.items()}
    choice = {"implementation": implementation}
    choice |= config if implementation == "triton" else {}
    with _tuned.forced("linear", choice), torch.no_grad():
        y, row_stats = linear(**inputs, implementation=implementation, return_row_stats=True)
    parts = y.double().view(-1, 3, 64)
    assert row_stats.shape == (3, 2, parts.shape[0])
    assert_close(row_stats[:, 0].t(), parts.mean(2).float())
    squares = (parts - parts.mean(2, keepdim=True)).square().sum(2)
    assert_close(row_stats[:, 1].t(), squares.float())


def test_operands_that_tensor_descriptors_cannot_address(device):
    """A base that is not a multiple of 16 bytes, and rows that are not."""
    seed(0)
    flat = torch.randn(40 * 64 + 1, device=device).half()
    weight = torch.randn(128, 64, device=device).half()
    for x, w in ((flat[1:].view(40, 64), weight), (flat[: 40 * 60].view(40, 60), weight[:, :60])):
        with _tuned.forced("linear", {"implementation": "triton", **HOPPER_CONFIGS[4]}):
            got = linear(x, w, implementation="triton")
        assert_close(got.float(), x.float() @ w.float().t(), dtype=FP16)


def test_gelu_of_half_precision_is_within_its_rounding(device):
    """Against erf: 3e-5, and nowhere more than bf16's half unit (seen through an fp32 result)."""
    x = torch.linspace(-12, 12, 4096, device=device).half()[:, None]
    one, zero = torch.ones(1, 1, device=device, dtype=FP16), torch.zeros(4096, 1, device=device)
    y = linear(x, one, activation="gelu", residual=zero, implementation="triton")
    assert y.dtype == FP32
    exact = torch.nn.functional.gelu(x.double())
    error = (y.double() - exact).abs()
    assert_at_most(error.max().item(), 3.2e-5)  # what the package promises
    half_unit = 2.0 ** (exact.abs().clamp_min(2.0**-16).log2().floor() - 8)
    assert_at_most((error / half_unit).max().item(), 0.6)
    ends = torch.tensor([[-65504.0], [65504.0], [torch.inf], [torch.nan]], device=device).half()
    got = linear(ends, one, activation="gelu", implementation="triton")[:, 0]
    assert got[:3].tolist() == [0.0, 65504.0, torch.inf] and got[3].isnan()


def test_gelu_is_the_erf_form_in_fp32(device):
    """The tanh form errs by 4.7e-4; fp32 erf must be far below it, tails included."""
    x = torch.linspace(-12, 12, 4096, device=device)[:, None]
    one = torch.ones(1, 1, device=device)
    y = linear(x, one, activation="gelu", implementation="triton")
    exact = torch.nn.functional.gelu(x.double())
    assert_at_most((y - exact).abs().max().item(), 1e-6)


def test_residual_stream_in_fp32_under_autocast(device):
    inputs = make_inputs(M=20, S=2, K=64, N=48, residual=True, device=device)
    with torch.autocast(device, FP16):
        y = linear(**inputs, implementation="triton")
        torchs = linear_reference(**inputs)
    exact = linear_reference(
        **{k: v.double() if k != "activation" else v for k, v in inputs.items()}
    )
    assert y.dtype == torchs.dtype == FP32
    assert_as_accurate(y, torchs, exact)


def test_row_scale_of_zero_leaves_the_residual(device):
    inputs = make_inputs(M=12, S=3, K=64, N=48, residual=True, row_scale=True, device=device)
    inputs["row_scale"] = torch.tensor([0.0, 2.0, 0.0], device=device)
    y = linear(**inputs, implementation="triton")
    assert_equal(y[[0, 2]], inputs["residual"][[0, 2]])
    assert (y[1] != inputs["residual"][1]).all()


def test_non_contiguous_input(device):
    x = torch.randn(40, 6, device=device).t()
    weight = torch.randn(40, 24, device=device).t()
    residual = torch.randn(6, 48, device=device)[:, ::2]
    got = linear(x, weight, residual=residual, implementation="triton")
    assert_close(got, linear_reference(x, weight, residual=residual))


def test_strided_vectors(device):
    inputs = make_inputs(
        M=12, S=4, K=64, N=48, residual=True, layer_scale=True, row_scale=True, device=device
    )
    inputs |= {k: inputs[k].repeat_interleave(2)[::2] for k in ("bias", "layer_scale")}
    inputs["row_scale"] = torch.full((1,), 0.5, device=device).expand(4)
    got = linear(**inputs, implementation="triton")
    assert_close(got, linear_reference(**inputs))


def test_nan_stays_in_its_row(device):
    inputs = make_inputs(M=70, S=1, K=64, N=48, device=device)
    inputs["x"][0, 3, 5] = torch.nan
    y = linear(**inputs, implementation="triton")[0]
    assert y[3].isnan().all() and y.isnan().any(1).sum() == 1
