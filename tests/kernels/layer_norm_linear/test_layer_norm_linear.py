"""layer_norm_linear against fp64: folded into the GEMM, and as two operations."""

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
    NO_CODE,
    assert_close,
    assert_differ,
    assert_equal,
    check,
    check_compiles,
    seed,
)
from losses import in_dtype
from tiers import slow

from deit_fast.kernels import (
    _tuned,
    cases,
    layer_norm_linear,
    layer_norm_linear_reference,
    linear,
)
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import layer_norm_linear_inputs as make_inputs
from deit_fast.kernels.layer_norm_linear import configs
from deit_fast.kernels.layer_norm_linear.op import _fwd
from deit_fast.kernels.linear.configs import AMPERE_CONFIGS, HOPPER_CONFIGS

folded = partial(layer_norm_linear, implementation="fold")
SMALL = configs.HOPPER_CONFIGS[-1]
separate = partial(layer_norm_linear, implementation="cublas")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("distribution", ["normal", "outliers", "offset"])
@pytest.mark.parametrize("case", cases.LAYER_NORM_LINEAR, ids=str)
def test_folding_is_no_less_accurate_than_torch(case, distribution, dtype, device):
    """Also where some channels are 50 times the others, and where the mean is ten deviations."""
    inputs = make_inputs(**case, distribution=distribution, device=device)
    check(folded, layer_norm_linear_reference, inputs, dtype, grads=False)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["separate", "cublas"])
@pytest.mark.parametrize("case", cases.LAYER_NORM_LINEAR, ids=str)
def test_values_and_gradients_of_the_two_operations(case, implementation, dtype, device):
    function = partial(layer_norm_linear, implementation=implementation)
    check(function, layer_norm_linear_reference, make_inputs(**case, device=device), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", HOPPER_CONFIGS + AMPERE_CONFIGS, ids=str)
def test_every_configuration_a_table_may_name(config, dtype, device):
    if config["TMA"] and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("GPU: this chip has no tensor descriptors")
    inputs = make_inputs(
        M=300, K=192, N=320, activation="gelu", distribution="offset", device=device
    )
    with _tuned.forced("linear", {"implementation": "triton", **config}):
        check(folded, layer_norm_linear_reference, inputs, dtype, grads=False)


@pytest.mark.parametrize("implementation", ["triton", slow("cublas")])
def test_row_stats_of_the_previous_linear(implementation, device):
    """The row statistics of a linear give what a kernel over its result gives."""
    seed(0)
    hidden, weight = torch.randn(1600, 96, device=device), torch.randn(192, 96, device=device)
    x, row_stats = linear(
        hidden.half(), weight.half(), implementation=implementation, return_row_stats=True
    )
    inputs = in_dtype(make_inputs(M=1600, K=192, N=64, device=device), FP16) | {"x": x}
    got = folded(**inputs, row_stats=row_stats)
    assert_close(got, folded(**inputs))
    row_stats[:, 0] += 1.0  # they are trusted
    assert_differ(folded(**inputs, row_stats=row_stats), got)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 30.0])
def test_small_and_large_gammas(size, device):
    """W g would be subnormal in fp16, or overflow with W up to 4000."""
    inputs = make_inputs(M=40, K=192, N=64, device=device)
    inputs["norm_weight"] *= size
    inputs["weight"] *= 0.3 if size < 1 else 9000.0
    inputs["norm_bias"] *= 0
    inputs["bias"] *= size
    check(folded, layer_norm_linear_reference, inputs, FP16, grads=False)


def test_eps(device):
    """As large as the variance: a millionth is not seen."""
    inputs = make_inputs(M=40, K=192, N=64, device=device) | {"eps": 0.5}
    for fn in (folded, separate):
        check(fn, layer_norm_linear_reference, inputs, FP16, grads=False)


def test_rows_that_do_not_vary(device):
    """Variance zero: eps alone keeps rstd finite."""
    inputs = in_dtype(make_inputs(M=5, K=64, N=32, device=device), FP16)
    inputs["x"] = torch.full_like(inputs["x"], 3.0)
    expected = layer_norm_linear_reference(**in_dtype(inputs, torch.float64))
    assert_close(folded(**inputs).double(), expected, dtype=FP16)


def test_nan_stays_in_its_row(device):
    inputs = in_dtype(make_inputs(M=70, K=64, N=48, device=device), FP16)
    inputs["x"][3, 5] = torch.nan
    y = folded(**inputs)
    assert y[3].isnan().all() and y.isnan().any(1).sum() == 1


def test_changed_weights_are_seen(device):
    inputs = in_dtype(make_inputs(M=70, K=64, N=48, device=device), FP16)
    before = folded(**inputs)
    for name in ("weight", "norm_weight", "norm_bias", "bias"):
        inputs[name].data.add_(1.0)
        after = folded(**inputs)
        assert_differ(after, before, name)
        before = after


def test_which_implementation_serves(device, monkeypatch):
    """Half precision without gradients: the prologue up to 8 million multiply-adds an SM, then
    folded for rows of twice the features (eight times where their row statistics are not known).
    What a table says comes first."""
    calls = []
    module = sys.modules["deit_fast.kernels.layer_norm_linear.op"]
    for name in ("_fwd", "_prologue"):
        real = getattr(module, name)
        spy = lambda *args, real=real, name=name: calls.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(module, name, spy)

    def served(dtype=FP16, implementation="triton", grad=False, known=True, **sizes):
        calls.clear()
        sizes = {"M": 96, "K": 64, "N": 48} | sizes
        inputs = in_dtype(make_inputs(**sizes, device=device), dtype)
        inputs["weight"].requires_grad_(grad)
        row_stats = torch.ones(1, 2, sizes["M"], device=device) if known else None
        layer_norm_linear(**inputs, row_stats=row_stats, implementation=implementation)
        names = {"_fwd": "fold", "_prologue": "prologue"}
        return [names[name] for name in calls] or ["separate"]

    def one(**options):
        (found,) = served(**options)
        return found

    assert one() == one(known=False) == one(M=20) == "prologue"
    assert one(dtype=FP32) == one(grad=True) == "separate"
    for implementation in ("cublas", "torch", "separate"):
        assert one(implementation=implementation) == "separate"
    for implementation in ("fold", "prologue"):
        assert one(M=20, implementation=implementation) == implementation
    with simulate_device(Chip("A100", (8, 0), 108)):
        assert one(implementation="auto") == "prologue"
    with simulate_device(Chip("V100", (7, 0), 80)):
        assert one(implementation="auto") == "separate"
    with monkeypatch.context() as patch:
        most = 100 * 48 * 64 // 4  # of the interpreter's four SMs, of (9, 0): 100 rows
        patch.setattr(configs, "LARGEST_PROLOGUE", {True: most, False: 0})
        assert one(M=100) == "prologue" and one(M=101) == "fold" and one(M=101, N=64) == "separate"
        assert one(M=384, known=False) == "fold" and one(M=383, known=False) == "separate"
        with _tuned.forced("layer_norm_linear", {"implementation": "prologue", **SMALL}):
            assert one(M=384) == one(M=20) == "prologue"
    for implementation in ("separate", "fold"):
        with _tuned.forced("layer_norm_linear", {"implementation": implementation}):
            assert one() == one(M=20) == implementation


def test_autocast(device):
    """An fp32 residual stream is not folded: rounding it would cost accuracy. A half one is."""
    inputs = make_inputs(M=96, K=64, N=48, device=device)
    exact = layer_norm_linear_reference(**in_dtype(inputs, torch.float64))
    with torch.autocast(device, FP16):
        got = layer_norm_linear(**inputs, implementation="triton")
        with pytest.raises(ValueError, match="'fold', but x is torch.float32"):
            folded(**inputs)
        with pytest.raises(ValueError, match="x is torch.bfloat16 and the GEMM torch.float16"):
            folded(**inputs | {"x": inputs["x"].bfloat16()})
        half = folded(**inputs | {"x": inputs["x"].half()})
    assert got.dtype == half.dtype == FP16
    assert_close(got.double(), exact, dtype=FP16)
    assert_close(half.double(), exact, dtype=FP16)


def test_op_contract(device):
    inputs = in_dtype(make_inputs(M=6, K=32, N=16, device=device), FP16)
    tensors = [inputs[k] for k in ("x", "norm_weight", "norm_bias", "weight", "bias")]
    torch.library.opcheck(_fwd.op, (*tensors, None, 1e-6, "gelu"))


@pytest.mark.slow
def test_compiles_into_one_graph(device):
    inputs = make_inputs(M=6, K=32, N=16, device=device)
    names = ("x", "norm_weight", "norm_bias", "weight", "bias")

    def f(*leaves):
        return layer_norm_linear(*leaves, activation="gelu", implementation="triton").cos()

    check_compiles(f, [inputs[k] for k in names])
    half = [inputs[k].detach().half() for k in names]
    compiled = torch.compile(folded, fullgraph=True, backend=NO_CODE)(*half)
    with torch.no_grad():
        dynamic = torch.compile(f, fullgraph=True, dynamic=True, backend=NO_CODE)
        assert_close(dynamic(*half), f(*half))
    assert_equal(compiled, folded(*half))


def test_strided_and_empty_input(device):
    inputs = in_dtype(make_inputs(M=12, K=64, N=48, device=device), FP16)
    x = inputs["x"]
    wide = torch.cat([x, x], 1)[:, ::2]
    expected = folded(**inputs | {"x": wide.contiguous()})
    assert_close(folded(**inputs | {"x": wide}), expected)
    assert folded(**inputs | {"x": x[:0]}).shape == (0, 48)


def test_bad_input_is_named():
    x, g, w = torch.zeros(6, 32), torch.ones(32), torch.zeros(16, 32)
    with pytest.raises(ValueError, match=r"norm_weight has shape \(31,\), expected \(32,\)"):
        layer_norm_linear(x, g[:31], g, w)
    with pytest.raises(ValueError, match=r"x has shape \(6, 32\), expected \(6, 31\)"):
        layer_norm_linear(x, g, g, w[:, :31])
    with pytest.raises(ValueError, match="activation 'relu'"):
        layer_norm_linear(x, g, g, w, activation="relu")
    with pytest.raises(
        ValueError, match="layer_norm_linear: implementation 'flod', expected one of"
    ):
        layer_norm_linear(x, g, g, w, implementation="flod")
    with pytest.raises(TypeError, match="bias has dtype torch.bfloat16, expected torch.float16"):
        folded(x.half(), g.half(), g.half(), w.half(), w[:, 0].to(BF16))
    with pytest.raises(ValueError, match=r"row_stats has shape \(1, 2, 5\), expected \(1, 2, 6\)"):
        layer_norm_linear(x, g, g, w, row_stats=torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="row statistics of 3 parts, expected a divisor of 32"):
        layer_norm_linear(x, g, g, w, row_stats=torch.zeros(3, 2, 6))
    with pytest.raises(ValueError, match="'fold', but gradients are wanted"):
        folded(x.half(), g.half().requires_grad_(), g.half(), w.half())
    with pytest.raises(TypeError, match="weight has dtype torch.bfloat16, expected torch.float16"):
        folded(x.half(), g.half(), g.half(), w.to(BF16))
