"""attention against fp64, out of the qkv product's layout, with and without a bias."""

from functools import partial

import pytest
import torch
from checking import (
    DOT_DTYPES,
    FP16,
    FP32,
    HALVES,
    assert_as_accurate,
    assert_close,
    assert_equal,
    assert_within,
    check,
    check_compiles,
    seed,
)
from selection import where

from deit_fast.kernels import (
    _tuned,
    attention,
    attention_quantized,
    attention_quantized_reference,
    attention_reference,
    cases,
    dequantize,
)
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.attention import (
    CONFIGS,
    FP32_CONFIG,
    LOG2_E,
    _fwd,
    _fwd_quantized,
    attention_backward,
    attention_backward_packed,
    configs,
    meta,
    meta_backward,
    pieces,
)
from deit_fast.kernels.cases import attention_inputs as make_inputs
from deit_fast.kernels.quantize import FORMATS, round_reference

# a scale for each row of each head, or one for all
QUANTIZED = pytest.mark.parametrize(
    "format, out_scale", [("fp8", None), ("fp8", 0.01), ("int8", None)], ids=str
)

triton_attention = partial(attention, implementation="triton")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_no_less_accurate_than_torch(case, bias, dtype, device):
    inputs = make_inputs(**case, bias=bias, device=device)
    # PyTorch gives no gradient to the bias of an empty batch
    check(triton_attention, attention_reference, inputs, dtype, grads=case["B"] > 0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(198, 198), (40, 578), (2, 198)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@where(lambda config, shape, dtype: config in configs(dtype, *shape, 64))
def test_every_configuration_a_table_may_name(config, shape, dtype, device):
    N, L = shape
    inputs = make_inputs(1, 2, N, max(N, L), 64, packed=True, device=device)
    with _tuned.forced("attention", {"implementation": "triton", **config}):
        check(triton_attention, attention_reference, inputs, dtype, grads=False)
        q, k, v = (t.to(dtype) for t in inputs.values())
        lse = _fwd(q, k, v, None, 0.125, True, "auto")[1]
    scores = torch.einsum("bnhd,blhd->bhnl", q.double(), k.double()) / 8
    assert_close(lse, (scores.logsumexp(3) * LOG2_E).float())


def test_a_table_may_give_it_to_torch(device):
    """With gradients it keeps its kernels, which leave what backward reads."""
    inputs = make_inputs(2, 2, 20, 20, 32, packed=True, device=device)
    halves = {name: t.half() for name, t in inputs.items()}
    with (
        simulate_device(Chip("H200", (9, 0), 4)),
        _tuned.forced("attention", {"implementation": "torch"}),
    ):
        got = attention(**halves)
        assert_equal(got, attention_reference(**halves))
        assert got.is_contiguous()
        check(attention, attention_reference, inputs, FP16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(198, 198), (2, 70), (33, 65)], ids=str)
def test_backward_on_an_a100(shape, dtype, device):
    """Fewer queries a program than on Hopper."""
    N, L = shape
    assert (
        meta_backward(N, L, dtype, (8, 0))["BLOCK_M"]
        < meta_backward(64, L, dtype, (9, 0))["BLOCK_M"]
    )
    with simulate_device(Chip("A100", (8, 0), 108)):
        check(
            triton_attention, attention_reference, make_inputs(1, 2, N, L, 32, device=device), dtype
        )


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("N", [5, 64, 70])
def test_packed_backward(N, capability, device):
    """The same gradients as of separate q, k and v, in one piece, and the sums of their rows."""
    seed(0)
    qkv = torch.randn(2, N, 3, 3, 32, device=device).half()
    do = torch.randn(2, N, 3, 32, device=device).half()
    with simulate_device(Chip("some GPU", capability, 108)):
        o, lse = _fwd(*qkv.unbind(2), None, 0.2, True, "triton")
        dqkv, sums = attention_backward_packed(do, qkv, o, lse, 0.2)
        separate = attention_backward(do, *qkv.unbind(2), o, lse, 0.2)
    assert dqkv.is_contiguous()
    assert_equal(dqkv, torch.stack(separate, 2))
    assert_close(sums, dqkv.float().sum((0, 1)), dtype=FP16)  # of what was rounded or not


@pytest.mark.parametrize("L", [65, 100, 128, 130, 144, 196, 197, 240, 255, 256])
def test_resident_keys_in_pieces(L, device):
    inputs = make_inputs(1, 1, 70, L, 32, device=device)
    first, second, third = pieces(L)
    assert L <= first + second + third < L + 32
    assert meta(70, L, 32, FP16)["RESIDENT"]
    check(triton_attention, attention_reference, inputs, FP16, grads=False)


def test_rule():
    """Resident where all keys fit; never with a bias, in fp32 or for the prefix tokens alone."""
    assert meta(198, 198, 64, FP16)["RESIDENT"] and not meta(198, 257, 64, FP16)["RESIDENT"]
    assert not meta(198, 198, 64, FP16, bias=True)["RESIDENT"]
    assert not meta(198, 198, 80, FP16)["RESIDENT"]
    assert meta(2, 198, 64, FP16)["BLOCK_M"] == meta(2, 198, 48, FP16)["BLOCK_M"] == 16
    assert meta(198, 198, 64, FP32) == FP32_CONFIG


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_that_is_not_positive(scale, device):
    inputs = make_inputs(1, 2, 20, 70, 32, device=device)
    got = triton_attention(**inputs, scale=scale)
    assert_close(got, attention_reference(**inputs, scale=scale))


@pytest.mark.parametrize("N", [1, 63, 64, 65, 100])
def test_views_of_the_qkv_product(N, device):
    seed(0)
    B, H, d = 2, 3, 32
    qkv = torch.randn(B, N, 3 * H * d, device=device)
    q, k, v = qkv.view(B, N, 3, H, d).unbind(2)
    o = triton_attention(q, k, v)
    assert o.is_contiguous() and o.shape == (B, N, H, d)
    assert_close(o, attention_reference(q, k, v))
    # one query block of the prefix tokens equals the same rows of the whole
    assert_close(triton_attention(q[:, :2], k, v), o[:, :2])


def test_large_scores_do_not_overflow(device):
    """fp16 scores beyond 65504 are what makes naive attention NaN."""
    inputs = make_inputs(1, 2, 70, 70, 64, device=device)
    inputs["q"], inputs["k"] = inputs["q"] * 100, inputs["k"] * 100
    q, k, v = (t.half() for t in inputs.values())
    exact = attention_reference(q.double(), k.double(), v.double())
    assert_as_accurate(triton_attention(q, k, v), attention_reference(q, k, v), exact)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_all_scores_far_below_zero(dtype, device):
    """exp(0 - their sum's logarithm) overflows: keys outside, of zeros, must not come in so. Of
    a row's gradient most is what the rounding of dS leaves, times the keys' mean: many rows."""
    inputs = make_inputs(2, 2, 70, 33, 32, device=device)
    inputs["q"] = inputs["q"] / 8 + 4
    inputs["k"] = inputs["k"] / 8 - 8
    check(triton_attention, attention_reference, inputs, dtype)


@pytest.mark.parametrize("key", [0, 130, 197])
def test_one_key_far_above_the_others(key, device):
    """The largest score counts in whichever piece it is: e^200 would overflow."""
    inputs = make_inputs(1, 1, 70, 198, 64, device=device)
    inputs["q"] = torch.full_like(inputs["q"], 5.0)
    inputs["k"][:, key] = 5.0
    q, k, v = (t.half() for t in inputs.values())
    o = triton_attention(q, k, v)
    assert_close(o, v[:, key : key + 1].expand_as(o))


def test_scale_argument(device):
    inputs = make_inputs(1, 2, 20, 20, 32, device=device)
    assert_close(triton_attention(**inputs, scale=0.3), attention_reference(**inputs, scale=0.3))


def test_keys_masked_by_minus_infinity(device):
    """Even where a whole block of keys, the first one, is masked."""
    inputs = make_inputs(1, 1, 5, 100, 32, bias=True, device=device)
    inputs["bias"][:, :, :70] = -torch.inf
    got = triton_attention(**inputs)
    assert not got.isnan().any()
    assert_close(got, attention_reference(**inputs))


def test_a_query_without_keys_gets_zero(device):
    inputs = make_inputs(1, 1, 5, 20, 32, bias=True, device=device)
    inputs["bias"][:, 1] = -torch.inf
    leaves = [t.requires_grad_() for t in inputs.values()]
    got, expected = triton_attention(**inputs), attention_reference(**inputs)
    assert not got[0, 1].any() and not got.isnan().any()
    assert_close(got, expected)
    for grad in torch.autograd.grad(got.square().sum(), leaves):
        assert not grad.isnan().any()


@pytest.mark.parametrize("layout", ["head first", "batch last"])
def test_any_strides(layout, device):
    seed(0)
    order = {"head first": (2, 0, 1, 3), "batch last": (1, 2, 0, 3)}[layout]
    back = [order.index(i) for i in range(4)]
    q, k, v = torch.randn(3, 2, 33, 3, 32, device=device).unbind()
    views = [t.permute(order).contiguous().permute(back) for t in (q, k, v)]
    assert not views[0].is_contiguous()
    expected = triton_attention(q, k, v)
    assert_equal(triton_attention(*views), expected)


def test_nan_reaches_its_own_head_and_row_only(device):
    inputs = make_inputs(2, 2, 9, 9, 32, device=device)
    inputs["q"][0, 4, 1] = torch.nan
    o = triton_attention(**inputs)
    assert o[0, 4, 1].isnan().all() and o.isnan().sum() == 32


def test_autocast(device):
    inputs = make_inputs(1, 2, 20, 20, 32, device=device)
    with torch.autocast(device, FP16):
        assert triton_attention(**inputs).dtype == attention_reference(**inputs).dtype == FP16
        inputs["k"] = inputs["k"].half()
        assert triton_attention(**inputs).dtype == FP16


def assert_quantized(q, k, v, format, out_scale, device, **options):
    """Against fp64, as near as the reference; and half a step at most, which counts what the score
    product's rounding adds as a fifth of one."""
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
    """d = 80 is held in 128 features, of which the last 48 must not count as a row's largest."""
    inputs = make_inputs(2, 2, 20, 20, 80, device=device)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs.values()]
    assert_quantized(*views, "int8", None, device, scale=-0.3)
    table = {"implementation": "torch"}  # of eight bits the kernels alone know
    with simulate_device(Chip("H200", (9, 0), 4)), _tuned.forced("attention", table):
        assert_quantized(*views, "fp8", None, device)


@QUANTIZED
def test_quantized_nan_stays_in_its_head_and_row(format, out_scale, device):
    """Not so of "torch": PyTorch's attention for the CPU makes zeros of such a row. All zeros have
    a scale."""
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


def test_quantized_saturates_at_the_scale_given(device):
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
    torch.library.opcheck(_fwd_quantized.op, (q, k, v, 0.2, FORMATS[format], scale, None))

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
    """q, k and v as values in e4m3, and their scale."""
    inputs = make_inputs(**case, packed=True, device=device)
    values = {name: round_reference(t / scale, FORMATS["fp8"]) for name, t in inputs.items()}
    return values, torch.full((1, 1), scale, device=device)


@pytest.mark.parametrize("out_scale", [None, 0.02])
@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_products_in_fp8(case, out_scale, device):
    """Of the numbers of softmax and of the result each is rounded by 2^-4 of itself at most, 0.026
    in the mean; a tenth more than both is allowed. PyTorch's way rounds once; of the few
    numbers of one query that is up to 0.035 in forty draws."""
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


def test_products_in_fp8_with_gaps_nan_and_small_weights(device):
    """A softmax that is far from even keeps what its small numbers add: a thousandth of the largest
    is still one of e4m3's normal numbers, 256 times."""
    case = {"B": 1, "H": 2, "N": 9, "L": 90, "d": 32}
    values, scale = in_fp8(case, device)
    call = partial(attention_quantized, in_scale=scale, implementation="triton")
    clean = call(**values)
    gaps = {k: t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in values.items()}
    assert torch.equal(call(**gaps).values.float(), clean.values.float())
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


def test_products_in_fp8_that_do_not_fit(device):
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
    with torch.autocast(device, FP16):  # what is in eight bits stays
        o = attention_quantized(**values, in_scale=scale, implementation="triton")
    plain = attention_quantized(**values, in_scale=scale, implementation="triton")
    assert torch.equal(o.values.float(), plain.values.float())
    torch.library.opcheck(
        _fwd_quantized.op, (*values.values(), 0.2, FORMATS["fp8"], None, scale),
        test_utils=("test_faketensor", "test_autograd_registration"),  # PyTorch multiplies no e4m3
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


def test_op_contract(device):
    q, k, v, bias = make_inputs(1, 2, 5, 7, 32, bias=True, device=device).values()
    tensors = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(_fwd.op, (*tensors, bias.requires_grad_(), 0.2, False, "triton"))
    torch.library.opcheck(_fwd.op, (*tensors, None, 0.2, True, "triton"))
    q, k, v = (t.detach() for t in tensors)
    o, lse = _fwd(q, k, v, None, 0.2, True, "triton")
    torch.library.opcheck(attention_backward.op, (torch.randn_like(o), q, k, v, o, lse, 0.2))
    qkv = torch.randn(1, 5, 3, 2, 32, device=device)
    o, lse = _fwd(*qkv.unbind(2), None, 0.2, True, "triton")
    packed = (torch.randn_like(o), qkv, o, lse, 0.2)
    torch.library.opcheck(attention_backward_packed.op, packed)


def test_compiles_into_one_graph(device):
    seed(0)
    qkv = torch.randn(2, 9, 3, 2, 32, device=device)

    def f(qkv):
        return triton_attention(*qkv.sin().unbind(2)).cos()

    check_compiles(f, [qkv])


def test_bad_input_is_named(device):
    q, k, v = make_inputs(1, 2, 5, 7, 32, device=device).values()
    with pytest.raises(ValueError, match=r"v has shape \(1, 5, 2, 32\), expected \(1, 7, 2, 32\)"):
        attention(q, k, v[:, :5])
    with pytest.raises(ValueError, match=r"bias has shape \(2, 5, 5\), expected \(2, 5, 7\)"):
        attention(q, k, v, bias=torch.zeros(2, 5, 5, device=device))
    with pytest.raises(TypeError, match="k has dtype torch.float16, expected torch.float32"):
        attention(q, k.half(), v)
    with pytest.raises(ValueError, match="head dimension 31"):
        attention(q[..., :31], k[..., :31], v[..., :31], implementation="triton")
    with pytest.raises(ValueError, match="at least one key"):
        attention(q, k[:, :0], v[:, :0])
    assert attention(q, k, v).dtype == FP32
