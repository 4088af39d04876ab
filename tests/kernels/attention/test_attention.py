"""attention against fp64, in the layout of the qkv GEMM, with and without a bias."""

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
    check,
    check_compiles,
    seed,
)
from selection import where

from deit_fast.kernels import _tuned, attention, attention_reference, cases
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.attention.configs import CONFIGS, FP32_CONFIG, configs, meta, pieces
from deit_fast.kernels.attention.forward import LOG2_E
from deit_fast.kernels.attention.op import _fwd, attention_backward
from deit_fast.kernels.cases import attention_inputs as make_inputs

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


def test_a_table_may_choose_torch(device):
    """With gradients the kernels serve all the same: backward reads the LSE that they write."""
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


@pytest.mark.parametrize("L", [65, 100, 128, 130, 144, 196, 197, 240, 255, 256])
def test_resident_keys_in_blocks(L, device):
    inputs = make_inputs(1, 1, 70, L, 32, device=device)
    first, second, third = pieces(L)
    assert L <= first + second + third < L + 32
    assert meta(70, L, 32, FP16)["RESIDENT"]
    check(triton_attention, attention_reference, inputs, FP16, grads=False)


def test_rule_without_a_table():
    """Resident where all keys fit; not with a bias, in fp32 or for the prefix tokens alone."""
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
def test_views_of_the_qkv_gemm(N, device):
    seed(0)
    B, H, d = 2, 3, 32
    qkv = torch.randn(B, N, 3 * H * d, device=device)
    q, k, v = qkv.view(B, N, 3, H, d).unbind(2)
    o = triton_attention(q, k, v)
    assert o.is_contiguous() and o.shape == (B, N, H, d)
    assert_close(o, attention_reference(q, k, v))
    # the prefix tokens alone get the same rows as among all queries
    assert_close(triton_attention(q[:, :2], k, v), o[:, :2])


def test_large_scores_do_not_overflow(device):
    """fp16 scores beyond 65504 are what makes naive attention NaN."""
    inputs = make_inputs(1, 2, 70, 70, 64, device=device)
    inputs["q"], inputs["k"] = inputs["q"] * 100, inputs["k"] * 100
    q, k, v = (t.half() for t in inputs.values())
    exact = attention_reference(q.double(), k.double(), v.double())
    assert_as_accurate(triton_attention(q, k, v), attention_reference(q, k, v), exact)


@pytest.mark.parametrize("key", [0, 130, 197])
def test_one_key_far_above_the_others(key, device):
    """The row maximum may be in any of the resident blocks: e^200 would overflow."""
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
    """Even where the whole first block of keys is masked."""
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


def test_op_contract(device):
    q, k, v, bias = make_inputs(1, 2, 5, 7, 32, bias=True, device=device).values()
    tensors = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(_fwd.op, (*tensors, bias.requires_grad_(), 0.2, False, "triton"))
    torch.library.opcheck(_fwd.op, (*tensors, None, 0.2, True, "triton"))
    q, k, v = (t.detach() for t in tensors)
    o, lse = _fwd(q, k, v, None, 0.2, True, "triton")
    torch.library.opcheck(attention_backward.op, (torch.randn_like(o), q, k, v, o, lse, 0.2))


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
