"""linear and its epilogues against fp64, as one Triton kernel and behind a cuBLAS product."""

import sys
from functools import partial

import pytest
import torch
from checking import (
    BF16,
    DOT_DTYPES,
    FP16,
    FP32,
    HALVES,
    assert_as_accurate,
    assert_at_most,
    assert_close,
    assert_equal,
    check,
    check_compiles,
    seed,
)
from selection import where

from deit_fast.kernels import _tuned, cases, linear, linear_reference
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import linear_inputs as make_inputs
from deit_fast.kernels.linear import (
    AMPERE_CONFIGS,
    FP32_CONFIG,
    HOPPER_CONFIGS,
    _fwd,
    configs,
    linear_backward,
    linear_gelu_backward,
    meta,
)

triton_linear = partial(linear, implementation="triton")
EPILOGUES = {
    "plain": {"bias": False},
    "bias": {},
    "gelu": {"activation": "gelu"},
    "residual": {"residual": True},
    "everything": {
        "activation": "gelu", "residual": True, "layer_scale": True, "row_scale": True,
    },
}  # fmt: skip


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
@pytest.mark.parametrize("config", HOPPER_CONFIGS + AMPERE_CONFIGS, ids=str)
def test_every_configuration_a_table_may_name(config, case, dtype, device):
    if config["TMA"] and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("GPU: this chip has no tensor descriptors")
    M, K, N = case
    inputs = make_inputs(M=M, S=2, K=K, N=N, **EPILOGUES["everything"], device=device)
    with _tuned.forced("linear", {"implementation": "triton", **config}):
        check(triton_linear, linear_reference, inputs, dtype, grads=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "config", [None, *configs(BF16, (9, 0), True), *configs(BF16, (8, 0), True)], ids=str
)
def test_gelu_backward_in_every_configuration(config, dtype, device):
    """dz, a and the sums of dz's columns; None is cuBLAS."""
    if (
        config
        and config["TMA"]
        and device == "cuda"
        and torch.cuda.get_device_capability() < (9, 0)
    ):
        pytest.skip("GPU: this chip has no tensor descriptors")
    seed(0)
    dy, weight = torch.randn(150, 72, device=device), torch.randn(72, 200, device=device) / 8
    operands = [t.to(dtype) for t in (dy, weight, torch.randn(150, 200, device=device))]

    def reference(dy, weight, z):
        dz = torch.ops.aten.gelu_backward(dy @ weight, z)
        return dz, torch.nn.functional.gelu(z), dz.sum(0)

    choice = {"implementation": "triton", **config} if config else {"implementation": "cublas"}
    with _tuned.forced("linear", choice):
        got = linear_gelu_backward(*operands, "auto")
    exact = reference(*(t.double() for t in operands))
    for name, ours, torchs, true in zip(
        ("dz", "a", "sums"), got, reference(*operands), exact, strict=True
    ):
        assert_as_accurate(ours, torchs, true, name)
    assert got[2].dtype == FP32


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", HOPPER_CONFIGS + AMPERE_CONFIGS, ids=str)
# cuBLAS takes no configuration; and narrower than what row statistics summarise, the rule chooses none
@where(lambda implementation, config: implementation == "triton" or config == HOPPER_CONFIGS[0])
@where(lambda config: config["BLOCK_N"] >= 64)
def test_row_stats_of_the_rounded_result(config, dtype, implementation, device):
    """mean and sum of squared differences of each 64 columns, also with a mean far from zero."""
    if config["TMA"] and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("GPU: this chip has no tensor descriptors")
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


@pytest.mark.parametrize("persistent", [False, True])
def test_programs(persistent, device, monkeypatch):
    """A program a tile; persistent ones, as many as the chip has multiprocessors."""
    config = HOPPER_CONFIGS[4 if persistent else 0]
    assert config["PERSISTENT"] == persistent
    grids = []
    module = sys.modules["deit_fast.kernels.linear"]

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_linear_kernel", Kernel())
    chip = Chip("NVIDIA H9000", (9, 0), 7)
    with simulate_device(chip), _tuned.forced("linear", {"implementation": "triton", **config}):
        for M in (100, 128 * 9):
            inputs = make_inputs(M=M, S=1, K=64, N=256, device=device)
            linear(inputs["x"].half(), inputs["weight"].half(), implementation="triton")
    assert grids == ([(2,), (7,)] if persistent else [(2,), (18,)])


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
    assert_at_most(error.max().item(), 3.2e-5)  # what the kernel's file promises
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


def test_empty_batch_with_stochastic_depth(device):
    inputs = make_inputs(M=4, S=2, K=64, N=48, row_scale=True, device=device)
    weight = inputs["weight"].requires_grad_()
    inputs |= {"x": inputs["x"][:0], "row_scale": inputs["row_scale"][:0]}
    (grad,) = torch.autograd.grad(linear(**inputs, implementation="triton").sum(), weight)
    assert not grad.any()


def test_nan_stays_in_its_row(device):
    inputs = make_inputs(M=70, S=1, K=64, N=48, device=device)
    inputs["x"][0, 3, 5] = torch.nan
    y = linear(**inputs, implementation="triton")[0]
    assert y[3].isnan().all() and y.isnan().any(1).sum() == 1


@pytest.mark.parametrize("row_stats", [False, True])
@pytest.mark.parametrize("N", [192, 384, 576, 768, 1000, 3072])
@pytest.mark.parametrize("M", [1, 198, 50_688])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_rule_gives_every_multiprocessor_a_tile(M, N, dtype, row_stats):
    """... unless even the smallest tile cannot; and row statistics get whole groups of columns."""
    for chip, num_sms in (((8, 0), 108), ((9, 0), 132), ((10, 0), 148)):
        config = meta(M, N, dtype, chip, num_sms, row_stats)
        assert config in configs(dtype, chip)
        tiles = -(-M // config["BLOCK_M"]) * -(-N // config["BLOCK_N"])
        smallest = config in (HOPPER_CONFIGS[2], AMPERE_CONFIGS[2], FP32_CONFIG)
        assert tiles >= num_sms or smallest or row_stats
        assert not row_stats or config["BLOCK_N"] >= 64


def test_second_derivative_where_only_the_residual_has_one(device):
    inputs = make_inputs(6, 2, 32, 16, activation="gelu", residual=True, device=device)
    residual = inputs["residual"].requires_grad_()
    y = linear(**inputs, implementation="triton")
    (first,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
    assert_close(first, 2 * y)
    (second,) = torch.autograd.grad(first.sum(), residual)
    assert_close(second, torch.full_like(second, 2.0))


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
    torch.library.opcheck(linear_backward.op, (dy, z, *scales, "gelu", FP16, True))
    torch.library.opcheck(linear_backward.op, (dy, None, None, None, "none", FP32, False))
    torch.library.opcheck(linear_gelu_backward.op, (dy, weight.detach(), x.detach(), "triton"))
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
