"""layer_norm_linear in one kernel, which normalises in its prologue, against fp64."""

from functools import partial

import pytest
import torch
from checking import (
    BF16,
    FP16,
    HALVES,
    NO_CODE,
    assert_close,
    assert_differ,
    assert_equal,
    check,
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
from deit_fast.kernels.cases import layer_norm_linear_inputs as make_inputs
from deit_fast.kernels.layer_norm_linear.configs import AMPERE_CONFIGS, HOPPER_CONFIGS
from deit_fast.kernels.layer_norm_linear.op import _prologue

prologue = partial(layer_norm_linear, implementation="prologue")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("distribution", ["normal", "outliers", "offset"])
@pytest.mark.parametrize("case", cases.LAYER_NORM_LINEAR, ids=str)
def test_no_less_accurate_than_torch(case, distribution, dtype, device):
    """Also where some channels are 50 times the others, and where the mean is ten deviations."""
    inputs = make_inputs(**case, distribution=distribution, device=device)
    check(prologue, layer_norm_linear_reference, inputs, dtype, grads=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"M": 1, "K": 192, "N": 576}, {"M": 3, "K": 40, "N": 24}, {"M": 131, "K": 100, "N": 67},
        slow({"M": 198, "K": 384, "N": 1152}), slow({"M": 198, "K": 768, "N": 192}),
    ],
    ids=str,
)  # fmt: skip
def test_odd_sizes(sizes, dtype, device):
    """K = 40 and 100 are no multiples of the 64 columns that a step takes."""
    inputs = make_inputs(**sizes, activation="gelu", distribution="offset", device=device)
    check(prologue, layer_norm_linear_reference, inputs, dtype, grads=False)


@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_means_far_from_zero(offset, device):
    """A thousand deviations: of fp16's numbers there one in two deviations is left, and exact
    differences of these. Sums of squares around zero would have lost them in fp32."""
    inputs = make_inputs(M=70, K=192, N=64, device=device)
    inputs["x"] = inputs["x"] + offset
    check(prologue, layer_norm_linear_reference, inputs, FP16, grads=False)


def test_the_first_columns_are_outliers(device):
    """The sums are of differences from the first 64 columns' mean: the worst place for outliers."""
    inputs = make_inputs(M=70, K=192, N=64, device=device)
    inputs["x"][:, :64] += 300.0
    check(prologue, layer_norm_linear_reference, inputs, FP16, grads=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", HOPPER_CONFIGS + AMPERE_CONFIGS, ids=str)
def test_every_configuration_a_table_may_name(config, dtype, device):
    if config["TMA"] and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("GPU: this chip has no tensor descriptors")
    inputs = make_inputs(
        M=300, K=192, N=320, activation="gelu", distribution="offset", device=device
    )
    with _tuned.forced("layer_norm_linear", {"implementation": "prologue", **config}):
        check(prologue, layer_norm_linear_reference, inputs, dtype, grads=False)


def test_row_stats_of_the_previous_linear(device):
    """They take the place of the first pass over x."""
    seed(0)
    hidden, weight = torch.randn(1600, 96, device=device), torch.randn(192, 96, device=device)
    x, row_stats = linear(
        hidden.half(), weight.half(), implementation="triton", return_row_stats=True
    )
    inputs = in_dtype(make_inputs(M=1600, K=192, N=64, device=device), FP16) | {"x": x}
    got = prologue(**inputs, row_stats=row_stats)
    assert_close(got, prologue(**inputs))
    row_stats[:, 0] += 1.0  # they are trusted
    assert_differ(prologue(**inputs, row_stats=row_stats), got)


def test_eps_and_rows_that_do_not_vary(device):
    inputs = make_inputs(M=40, K=192, N=64, device=device) | {"eps": 0.5}
    check(prologue, layer_norm_linear_reference, inputs, FP16, grads=False)
    for K in (192, 48):
        inputs = in_dtype(make_inputs(M=5, K=K, N=32, device=device), FP16)
        inputs["x"] = torch.full_like(inputs["x"], 3.3)
        expected = layer_norm_linear_reference(**in_dtype(inputs, torch.float64))
        assert_close(prologue(**inputs).double(), expected, dtype=FP16)


def test_norms_of_another_dtype(device):
    inputs = in_dtype(make_inputs(M=40, K=192, N=64, device=device), FP16)
    wide = {k: inputs[k].float() for k in ("norm_weight", "norm_bias")}
    assert_equal(prologue(**inputs | wide), prologue(**inputs))


def test_nan_stays_in_its_row(device):
    inputs = in_dtype(make_inputs(M=70, K=64, N=48, device=device), FP16)
    inputs["x"][3, 5] = torch.nan
    y = prologue(**inputs)
    assert y[3].isnan().all() and y.isnan().any(1).sum() == 1


def test_changed_weights_are_seen(device):
    """Changes through .data too: nothing that was made of a weight is kept."""
    inputs = in_dtype(make_inputs(M=70, K=64, N=48, device=device), FP16)
    kept = {k: inputs[k].clone() for k in ("weight", "norm_weight", "norm_bias", "bias")}
    before = prologue(**inputs)
    for name, value in kept.items():
        assert_equal(inputs[name], value)
        inputs[name].data.add_(1.0)
        after = prologue(**inputs)
        assert_differ(after, before, name)
        before = after


def test_strided_unaligned_and_empty_input(device):
    inputs = in_dtype(make_inputs(M=12, K=64, N=48, device=device), FP16)
    x, weight = inputs["x"], inputs["weight"]
    wide = torch.cat([x, x], 1)[:, ::2]
    expected = prologue(**inputs | {"x": wide.contiguous()})
    assert_equal(prologue(**inputs | {"x": wide}), expected)
    columns = x.view(3, 4, 64).transpose(1, 2).contiguous().transpose(1, 2)
    assert_equal(prologue(**inputs | {"x": columns}).view(12, 48), prologue(**inputs))
    first = prologue(**inputs | {"x": x.view(3, 4, 64)[:, :1]})  # the first token of each sample
    assert_equal(first, prologue(**inputs).view(3, 4, 48)[:, :1])
    moved = torch.empty(48 * 64 + 1, dtype=FP16, device=device)[1:].view(48, 64)
    moved.copy_(weight)  # tensor descriptors cannot address it
    assert_equal(prologue(**inputs | {"weight": moved}), prologue(**inputs))
    assert prologue(**inputs | {"x": x[:0]}).shape == (0, 48)
    assert prologue(**inputs | {"x": x[:0].view(0, 3, 64)}).shape == (0, 3, 48)


def test_op_contract(device):
    inputs = in_dtype(make_inputs(M=6, K=32, N=16, device=device), FP16)
    x, *tensors = [inputs[k] for k in ("x", "norm_weight", "norm_bias", "weight", "bias")]
    torch.library.opcheck(_prologue.op, (x, *tensors, None, 1e-6, "gelu"))


@pytest.mark.slow
def test_compiles_into_one_graph(device):
    inputs = make_inputs(M=6, K=32, N=16, device=device)
    names = ("x", "norm_weight", "norm_bias", "weight", "bias")
    half = [inputs[k].detach().half() for k in names]
    compiled = torch.compile(prologue, fullgraph=True, backend=NO_CODE)(*half)
    assert_equal(compiled, prologue(*half))
    x = half[0].view(2, 3, 32)[:, :1]
    compiled = torch.compile(prologue, fullgraph=True, backend=NO_CODE, dynamic=True)
    assert_equal(compiled(x, *half[1:]), prologue(x, *half[1:]))


def test_where_it_cannot_be():
    x, g, w = torch.zeros(6, 32), torch.ones(32), torch.zeros(16, 32)
    with pytest.raises(ValueError, match="'prologue', but gradients are wanted"):
        prologue(x.half(), g.half().requires_grad_(), g.half(), w.half())
    with pytest.raises(ValueError, match="'prologue', but x is torch.float32"):
        prologue(x, g, g, w)
    with pytest.raises(TypeError, match="weight has dtype torch.bfloat16, expected torch.float16"):
        prologue(x.half(), g.half(), g.half(), w.to(BF16))
