"""softmax(scale * q k^T + bias) v, read where qkv wrote it, written where proj reads it.

    s = scale * q k^T + bias      p = softmax(s)      o = p v

Backward, with delta = rowsum(do * o), which is rowsum(dp * p):
    dv = p^T do    dp = do v^T    ds = p * (dp - delta)
    dq = scale * ds k    dk = scale * ds^T q    dbias = sum_batch(ds)
p comes again from q, k and the logarithm of each row's sum, block by block: nothing of size N x L
is ever written. One launch: some programs own queries and make dq, some own keys and make dk and
dv, and those of a head run side by side, so that what they share comes from the cache. No atomics.
With a bias, or d = 80, the backward is PyTorch's and holds the scores.

B samples, H heads, N queries, L keys, d features a head (32, 48, 64 or 80). q (B, N, H, d) and k, v
(B, L, H, d) may be views with any strides but a unit one in d: `qkv.view(B, N, 3, H, d).unbind(2)`
costs no copy. o is a new (B, N, H, d), which is the projection's (B, N, H * d). Scores, softmax and
sums are fp32; p is rounded to v's dtype for the second product, ds to q's. Saved for backward: q,
k, v, o and the logarithms (B, H, N) in fp32; where backward is PyTorch's q, k, v and the bias.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _chips, _dispatch, _policy, _tuned
from .quantize import (
    Quantized,
    _round,
    _scales,
    expect_float,
    expect_scale,
    quantize_reference,
    quantize_statically_reference,
    storage,
)

HEAD_DIMS = (32, 48, 64, 80)
TRAINED_HEAD_DIMS = (32, 48, 64)  # of the fused backward; 80 would spill
LOG2_E = 1.4426950408889634


def attention_reference(q, k, v, scale=None, bias=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)
    return _dispatch.sdpa(q, k, v, mask, scale).transpose(1, 2)


def attention_quantized_reference(q, k, v, scale=None, format="fp8", out_scale=None, in_scale=None):
    if in_scale is not None:
        q, k, v = (t.float() * in_scale.view(()) for t in (q, k, v))
    o = attention_reference(q, k, v, scale)
    if out_scale is not None:
        return quantize_statically_reference(o.flatten(2), out_scale)
    return quantize_reference(o.flatten(2), format, parts=o.shape[2])


@triton.jit
def _dims(HEAD_DIM: tl.constexpr):
    """Features of a head, as many as a power of two has room for: 80 are 128 on the chip, of which
    the last 48 are never read or written."""
    return tl.arange(0, triton.next_power_of_2(HEAD_DIM))


@triton.jit
def _inside(in_rows, HEAD_DIM: tl.constexpr):
    """Mask of rows that lie side by side."""
    dims = _dims(HEAD_DIM)
    mask = in_rows[:, None]
    if HEAD_DIM < dims.shape[0]:
        mask = mask & (dims < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _weigh(p, v, acc):
    """acc + p v, p rounded to v's dtype. p is between 0 and 1; e4m3 gets it 256 times as large, so
    that less of it falls below its numbers: _unscaled puts that right."""
    if v.dtype == tl.float8e4nv:
        p = p * 256.0
    return tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")


@triton.jit
def _unscaled(acc, v_ptr, in_scale_ptr):
    """What _weigh summed of values in eight bits, with their scale."""
    if in_scale_ptr is not None:
        acc *= tl.load(in_scale_ptr) / (256.0 if v_ptr.dtype.element_ty == tl.float8e4nv else 1.0)
    return acc


@triton.jit
def _store_rows(o_ptrs, scales_ptr, o, mask, in_rows, row, BY_HEAD: tl.constexpr):
    """Rows of one head's result; in eight bits by a scale of their own, which is stored as well, or
    by the one scale that is there."""
    if scales_ptr is not None:
        INT8: tl.constexpr = o_ptrs.dtype.element_ty == tl.int8
        if BY_HEAD:
            scales, inverse = _scales(o, INT8)
            tl.store(scales_ptr + row, scales, mask=in_rows)
            o = _round(o, inverse[:, None], INT8)
        else:
            o = _round(o, 1.0 / tl.load(scales_ptr), INT8)
    tl.store(o_ptrs, o, mask=mask)


@triton.jit
def _attend(
    q, acc, peak, total, k_ptr, v_ptr, bias_ptrs, first, L, k_row, v_row, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys first ... first + BLOCK - 1."""
    keys = first + tl.arange(0, BLOCK)
    dims = _dims(HEAD_DIM)
    inside = keys < L
    k_ptrs = k_ptr + keys[None, :] * k_row + dims[:, None]
    v_ptrs = v_ptr + keys[:, None] * v_row + dims[None, :]
    if HEAD_DIM < dims.shape[0]:
        filled = dims < HEAD_DIM
        k = tl.load(k_ptrs, mask=inside[None, :] & filled[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=inside[:, None] & filled[None, :], other=0.0)
    elif MASKED:
        k = tl.load(k_ptrs, mask=inside[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=inside[:, None], other=0.0)
    else:
        k, v = tl.load(k_ptrs), tl.load(v_ptrs)

    s = tl.dot(q, k, input_precision="ieee")
    if bias_ptrs is not None:
        bias = tl.load(bias_ptrs + keys[None, :], mask=inside[None, :], other=0.0)
        s = s * scale + bias.to(tl.float32) * 1.4426950408889634  # log2(e)
        scale = 1.0
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    # a row whose keys so far are all masked by the bias: -inf - -inf would be NaN
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s * scale - (shift * scale)[:, None])  # one FMA: the scale is positive
    decay = tl.exp2((peak - shift) * scale)
    total = total * decay + tl.sum(p, axis=1)
    return _weigh(p, v, acc * decay[:, None]), new_peak, total


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # in: (B, N, H, d) (B, L, H, d) (B, L, H, d) (H, N, L) or None
    o_ptr, lse_ptr,  # out: (B, N, H, d), contiguous, (B, H, N) or None, never with a bias
    scales_ptr,  # where o is in eight bits; out: (H, B, N), or BY_HEAD is False, in: one
    in_scale_ptr,  # where q, k and v are in eight bits; in: one
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides
    B, N, H, scale,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)  # one dimension: the others stop at 65535, and windows are many
    head = ((pid // tiles) % H).to(tl.int64)
    sample = (pid // (tiles * H)).to(tl.int64)  # int64, as head: strides may pass 2**31
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = _dims(HEAD_DIM)
    in_rows = rows < N
    mask = _inside(in_rows, HEAD_DIM)

    if in_scale_ptr is not None:
        # not 0: the masked scores' infinity times it would be NaN
        scale *= tl.maximum(tl.load(in_scale_ptr) * tl.load(in_scale_ptr), 1e-30)
    q_offs = sample * q_batch + head * q_head + rows[:, None] * q_row + dims[None, :]
    q = tl.load(q_ptr + q_offs, mask=mask, other=0.0)
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    if bias_ptr is not None:
        # rows outside read row 0: their result is not stored
        safe_rows = tl.where(in_rows, rows, 0).to(tl.int64)
        bias_ptrs = bias_ptr + (head * N + safe_rows)[:, None] * L
    else:
        bias_ptrs = None

    acc = tl.zeros((BLOCK_M, dims.shape[0]), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Whole blocks without masks, then one tail just wide enough: 198 = 3 * 64 + 6 costs 208 keys.
    WHOLE: tl.constexpr = L // BLOCK_N * BLOCK_N
    for first in range(0, WHOLE, BLOCK_N):
        acc, peak, total = _attend(
            q, acc, peak, total, k_ptr, v_ptr, bias_ptrs, first, L, k_row, v_row, scale,
            BLOCK_N, HEAD_DIM, False,
        )  # fmt: skip
    if L > WHOLE:
        acc, peak, total = _attend(
            q, acc, peak, total, k_ptr, v_ptr, bias_ptrs, WHOLE, L, k_row, v_row, scale,
            BLOCK_TAIL, HEAD_DIM, True,
        )  # fmt: skip

    o_offs = ((sample * N + rows[:, None]) * H + head) * HEAD_DIM + dims[None, :]
    total = tl.where(total == 0.0, 1.0, total)  # every key masked: 0, as in PyTorch
    if lse_ptr is not None:
        lse_ptrs = lse_ptr + (sample * H + head) * N + rows
        tl.store(lse_ptrs, peak * scale + tl.log2(total), mask=in_rows)
    o = _unscaled(acc, v_ptr, in_scale_ptr) / total[:, None]
    scale_row = (head * B + sample) * N + rows
    _store_rows(o_ptr + o_offs, scales_ptr, o, mask, in_rows, scale_row, BY_HEAD)


@triton.jit
def _rows(ptr, first, size, row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows first ... first + BLOCK - 1 of one head of q, k, v, o or do; zero from `size` on."""
    rows, dims = first + tl.arange(0, BLOCK), _dims(HEAD_DIM)
    ptrs = ptr + rows[:, None] * row + dims[None, :]
    if MASKED or HEAD_DIM < dims.shape[0]:
        return tl.load(ptrs, mask=_inside(rows < size, HEAD_DIM), other=0.0)
    return tl.load(ptrs)


@triton.jit
def _scores(q, k, first, L: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.dot(q, k.T, input_precision="ieee")
    if first + BLOCK > L:
        s = tl.where((first + tl.arange(0, BLOCK) < L)[None, :], s, float("-inf"))
    return s


@triton.jit
def _attention_resident_kernel(
    q_ptr, k_ptr, v_ptr,  # in: (B, N, H, d) (B, L, H, d) (B, L, H, d)
    o_ptr, lse_ptr, scales_ptr, in_scale_ptr,  # as _attention_kernel's
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides
    B, N, H, scale,
    L: tl.constexpr, BLOCK_M: tl.constexpr, KEYS_0: tl.constexpr, KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr, HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """One program a head: its keys and values are read once, in two or three pieces that stay on
    the chip, and each block of queries gets one softmax over all of them."""
    head = (tl.program_id(0) % H).to(tl.int64)
    sample = (tl.program_id(0) // H).to(tl.int64)  # int64, as head: strides may pass 2**31
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    o_ptr += (sample * N * H + head) * HEAD_DIM
    if in_scale_ptr is not None:
        # not 0: the masked scores' infinity times it would be NaN
        scale *= tl.maximum(tl.load(in_scale_ptr) * tl.load(in_scale_ptr), 1e-30)
    SECOND: tl.constexpr = KEYS_0
    THIRD: tl.constexpr = KEYS_0 + KEYS_1
    k0 = _rows(k_ptr, 0, L, k_row, KEYS_0, HEAD_DIM, True)
    v0 = _rows(v_ptr, 0, L, v_row, KEYS_0, HEAD_DIM, True)
    k1 = _rows(k_ptr, SECOND, L, k_row, KEYS_1, HEAD_DIM, True)
    v1 = _rows(v_ptr, SECOND, L, v_row, KEYS_1, HEAD_DIM, True)
    if KEYS_2:
        k2 = _rows(k_ptr, THIRD, L, k_row, KEYS_2, HEAD_DIM, True)
        v2 = _rows(v_ptr, THIRD, L, v_row, KEYS_2, HEAD_DIM, True)
    dims = _dims(HEAD_DIM)
    for first in range(0, N, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < N
        q = _rows(q_ptr, first, N, q_row, BLOCK_M, HEAD_DIM, True)
        s0, s1 = _scores(q, k0, 0, L, KEYS_0), _scores(q, k1, SECOND, L, KEYS_1)
        peak = tl.maximum(tl.max(s0, axis=1), tl.max(s1, axis=1))
        if KEYS_2:
            s2 = _scores(q, k2, THIRD, L, KEYS_2)
            peak = tl.maximum(peak, tl.max(s2, axis=1))
        peak *= scale  # positive
        p0, p1 = tl.exp2(s0 * scale - peak[:, None]), tl.exp2(s1 * scale - peak[:, None])
        total = tl.sum(p0, axis=1) + tl.sum(p1, axis=1)
        acc = _weigh(p0, v0, None)
        acc = _weigh(p1, v1, acc)
        if KEYS_2:
            p2 = tl.exp2(s2 * scale - peak[:, None])
            total += tl.sum(p2, axis=1)
            acc = _weigh(p2, v2, acc)
        o_ptrs = o_ptr + rows[:, None] * (H * HEAD_DIM) + dims[None, :]
        scale_row = (head * B + sample) * N + rows
        _store_rows(
            o_ptrs, scales_ptr, _unscaled(acc, v_ptr, in_scale_ptr) / total[:, None],
            _inside(in_rows, HEAD_DIM), in_rows, scale_row, BY_HEAD,
        )  # fmt: skip
        if lse_ptr is not None:
            lse_ptrs = lse_ptr + (sample * H + head) * N + rows
            tl.store(lse_ptrs, peak + tl.log2(total), mask=in_rows)


@triton.jit
def _dq_step(
    q, do, lse, delta, dq, k_ptr, v_ptr, first, L, k_row, v_row, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What keys first ... first + BLOCK - 1 add to dq."""
    k = _rows(k_ptr, first, L, k_row, BLOCK, HEAD_DIM, MASKED)
    v = _rows(v_ptr, first, L, v_row, BLOCK, HEAD_DIM, MASKED)
    s = tl.dot(q, k.T, input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:  # a key of zeros adds nothing, unless its p overflows
        p = tl.where((first + tl.arange(0, BLOCK) < L)[None, :], p, 0.0)
    dp = tl.dot(do, v.T, input_precision="ieee")
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee")


@triton.jit
def _dkv_step(
    k, v, dk, dv, q_ptr, o_ptr, do_ptr, lse_ptr, first, N, q_row, o_row, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What queries first ... first + BLOCK - 1 add to dk and dv. Those outside have zeros for q and
    do, and so add nothing."""
    q = _rows(q_ptr, first, N, q_row, BLOCK, HEAD_DIM, MASKED)
    do = _rows(do_ptr, first, N, o_row, BLOCK, HEAD_DIM, MASKED)
    o = _rows(o_ptr, first, N, o_row, BLOCK, HEAD_DIM, MASKED)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    rows = first + tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    s = tl.dot(k, q.T, input_precision="ieee")  # transposed: keys x queries
    p = tl.exp2(s * scale - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, do.T, input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision="ieee"), dv


@triton.jit
def _store_gradient(
    ptr, sums_ptr, grad, first, size, row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """A block of dq, dk or dv, and the sum of its rows."""
    rows, dims = first + tl.arange(0, BLOCK), _dims(HEAD_DIM)
    mask = _inside(rows < size, HEAD_DIM)
    tl.store(ptr + rows[:, None] * row + dims[None, :], grad, mask=mask)
    if sums_ptr is not None:
        sums = tl.sum(tl.where(mask, grad, 0.0), axis=0)
        tl.store(sums_ptr + dims, sums, mask=dims < HEAD_DIM)


@triton.jit
def _attention_backward_kernel(
    q_ptr, k_ptr, v_ptr,  # in: (B, N, H, d) (B, L, H, d) (B, L, H, d)
    o_ptr, do_ptr, lse_ptr,  # in: (B, N, H, d) contiguous, (B, N, H, d) contiguous, (B, H, N)
    dq_ptr, dk_ptr, dv_ptr,  # out: (B, N, H, d) (B, L, H, d) (B, L, H, d), heads without gaps
    q_sums_ptr, kv_sums_ptr,  # out: (B, tiles, H, d) and (B, tiles, 2, H, d) in fp32, or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dq_row, dk_row,
    H, scale,
    N: tl.constexpr, L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL_M: tl.constexpr, TAIL_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    tiles_m: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (L + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    tile = pid % (tiles_m + tiles_n)
    pid = pid // (tiles_m + tiles_n)
    head, sample = (pid % H).to(tl.int64), (pid // H).to(tl.int64)
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    o_row = H * HEAD_DIM
    o_ptr += sample * N * o_row + head * HEAD_DIM
    do_ptr += sample * N * o_row + head * HEAD_DIM
    lse_ptr += (sample * H + head) * N
    dq_ptr += sample * N * dq_row + head * HEAD_DIM
    dk_ptr += sample * L * dk_row + head * HEAD_DIM
    dv_ptr += sample * L * dk_row + head * HEAD_DIM
    scale2 = scale * 1.4426950408889634  # log2(e)
    WHOLE_M: tl.constexpr = N // BLOCK_M * BLOCK_M
    WHOLE_N: tl.constexpr = L // BLOCK_N * BLOCK_N
    if tile < tiles_n:  # keys; first, because they take longer
        dk_sums, dv_sums = None, None
        if kv_sums_ptr is not None:
            dk_sums = kv_sums_ptr + ((sample * tiles_n + tile) * 2 * H + head) * HEAD_DIM
            dv_sums = dk_sums + H * HEAD_DIM
        first = tile * BLOCK_N
        k = _rows(k_ptr, first, L, k_row, BLOCK_N, HEAD_DIM, True)
        v = _rows(v_ptr, first, L, v_row, BLOCK_N, HEAD_DIM, True)
        dk = tl.zeros(k.shape, tl.float32)
        dv = tl.zeros(k.shape, tl.float32)
        for start in range(0, WHOLE_M, BLOCK_M):
            dk, dv = _dkv_step(
                k, v, dk, dv, q_ptr, o_ptr, do_ptr, lse_ptr, start, N, q_row, o_row, scale2,
                BLOCK_M, HEAD_DIM, False,
            )  # fmt: skip
        if N > WHOLE_M:
            dk, dv = _dkv_step(
                k, v, dk, dv, q_ptr, o_ptr, do_ptr, lse_ptr, WHOLE_M, N, q_row, o_row, scale2,
                TAIL_M, HEAD_DIM, True,
            )  # fmt: skip
        _store_gradient(dk_ptr, dk_sums, dk * scale, first, L, dk_row, BLOCK_N, HEAD_DIM)
        _store_gradient(dv_ptr, dv_sums, dv, first, L, dk_row, BLOCK_N, HEAD_DIM)
    else:
        tile -= tiles_n
        if q_sums_ptr is not None:
            q_sums_ptr += ((sample * tiles_m + tile) * H + head) * HEAD_DIM
        first = tile * BLOCK_M
        q = _rows(q_ptr, first, N, q_row, BLOCK_M, HEAD_DIM, True)
        do = _rows(do_ptr, first, N, o_row, BLOCK_M, HEAD_DIM, True)
        o = _rows(o_ptr, first, N, o_row, BLOCK_M, HEAD_DIM, True)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
        rows = first + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
        dq = tl.zeros(q.shape, tl.float32)
        for start in range(0, WHOLE_N, BLOCK_N):
            dq = _dq_step(
                q, do, lse, delta, dq, k_ptr, v_ptr, start, L, k_row, v_row, scale2,
                BLOCK_N, HEAD_DIM, False,
            )  # fmt: skip
        if L > WHOLE_N:
            dq = _dq_step(
                q, do, lse, delta, dq, k_ptr, v_ptr, WHOLE_N, L, k_row, v_row, scale2,
                TAIL_N, HEAD_DIM, True,
            )  # fmt: skip
        _store_gradient(dq_ptr, q_sums_ptr, dq * scale, first, N, dq_row, BLOCK_M, HEAD_DIM)


def _config(m, n, warps, stages, resident=False):
    return {
        "RESIDENT": resident, "BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


# by the size of an element: what a product sums over, of 16 and of 8 bits (fp32 as 16)
LEAST_KEYS = {4: 16, 2: 16, 1: 32}
FP32_CONFIG = _config(16, 16, 4, 2)  # FMA units: registers hold the operands too
# Keys and values resident, 64 queries at a time: two or three CTAs a multiprocessor.
RESIDENT_CONFIG = _config(64, 64, 4, 1, resident=True)
FEW_QUERIES_CONFIG = _config(16, 64, 4, 2)  # the prefix tokens alone
# Heads whose width on the chip is not theirs take masks, which take registers.
PADDED_CONFIG, PADDED_FEW_CONFIG = _config(64, 64, 8, 2), _config(16, 64, 4, 3)
WIDE_FP32_CONFIG = _config(16, 16, 8, 2)  # d = 80
# 64 queries in 4 warps leave room for four CTAs a multiprocessor (sm_90). Blocks of 64 keys leave
# 198 and 578 a tail of 16.
ONLINE_CONFIG = _config(64, 64, 4, 3)
CONFIGS = [
    RESIDENT_CONFIG,
    _config(128, 64, 8, 1, resident=True),
    FEW_QUERIES_CONFIG,
    ONLINE_CONFIG,
    _config(64, 64, 4, 2),
    _config(128, 64, 8, 3),
    _config(128, 64, 8, 2),
]


def configs(dtype: torch.dtype, N: int, L: int, d: int, bias: bool = False) -> list[dict]:
    """Every configuration of the Triton kernels that a tuned table may name for a shape."""
    if dtype == torch.float32:
        return [FP32_CONFIG if d <= 64 else WIDE_FP32_CONFIG]
    if d & (d - 1):
        return [PADDED_FEW_CONFIG if N <= 16 else PADDED_CONFIG]
    if N <= 16:
        return [FEW_QUERIES_CONFIG]
    fits = 64 < L <= 256 and not bias
    if dtype.itemsize == 1:
        return [RESIDENT_CONFIG if fits else ONLINE_CONFIG]
    return [c for c in CONFIGS if c["BLOCK_M"] >= 64 and (fits or not c["RESIDENT"])]


@cache
def meta(N: int, L: int, d: int, dtype: torch.dtype, bias: bool = False) -> dict:
    """The configuration for a shape that no table lists."""
    offered = configs(dtype, N, L, d, bias)
    if len(offered) == 1:
        return offered[0]
    return RESIDENT_CONFIG if RESIDENT_CONFIG in offered else ONLINE_CONFIG


@cache
def meta_backward(N: int, L: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict:
    """Blocks by rule: 64 x 64 in 4 warps, as forward, two CTAs a multiprocessor; 32 queries on
    sm_80 and sm_120, where 64 spill. For few queries blocks just as high."""
    M, block, warps, stages = 64 if _chips.is_datacenter(capability) else 32, 64, 4, 2
    if dtype == torch.float32:  # FMA units: registers hold the operands too
        M, block, warps, stages = 16, 16, 8, 1
    M = 16 if N <= 16 else M
    return {
        "BLOCK_M": M, "BLOCK_N": block, "TAIL_M": tail(N, M), "TAIL_N": tail(L, block),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@cache
def pieces(L: int, least: int = 16) -> tuple[int, int, int]:
    """64 < L <= 256 keys in two or three pieces, powers of two, with little to spare: 198 in 128,
    64 and 16; the third may be 0. `least`: of a piece, 32 in eight bits."""
    first = 128 if L >= 128 else 64
    rest = max(L - first, 1)
    second = max(least, 1 << rest.bit_length() - 1)
    rest = L - first - second
    return first, second, max(least, triton.next_power_of_2(rest)) if rest > 0 else 0


@cache
def tail(L: int, block: int, least: int = 16) -> int:
    """The power of two that holds what whole blocks leave."""
    return max(least, triton.next_power_of_2(L % block))


@_tuned.validates("attention")
def _why_not(shape, choice, capability):
    dtype = getattr(torch, str(shape.get("dtype")), None)
    if dtype not in _checks.DTYPES:
        return f"dtype {shape.get('dtype')!r}"
    sizes = [shape.get(name) for name in ("N", "L", "d")]
    if not all(isinstance(n, int) and n > 0 for n in sizes):
        return f"N, L and d are {sizes}"
    offered = configs(dtype, *sizes, bool(shape.get("bias")))
    return _tuned.check_choice(choice, ("triton", "torch"), offered)


def _choose(q, L, bias, implementation):
    """("torch" or "triton", configuration): a tuned table's word, or the rule's."""
    B, N, H, d = q.shape
    shape = {"M": B * H, "N": N, "L": L, "d": d, "dtype": str(q.dtype)[6:], "bias": bias}
    found = _tuned.lookup("attention", shape, _chips.chip(q.device))
    if found is not None and implementation in ("auto", found["implementation"]):
        return found["implementation"], {k: v for k, v in found.items() if k != "implementation"}
    return "triton", meta(N, L, d, q.dtype, bias)


def _alloc(q, keep):
    """What forward returns: o, and the logarithms of the rows' sums. Also its fake."""
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, N) if keep else 0, dtype=torch.float32)


@_dispatch.custom_op("deit_fast::attention")
def _fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not keep and q.numel():  # backward wants what only the kernels leave
        if _choose(q, k.shape[1], bias is not None, implementation)[0] == "torch":
            o = attention_reference(q, k, v, scale, bias).contiguous()
            return o, q.new_empty(0, dtype=torch.float32)
    o, lse = _alloc(q, keep)
    if o.numel():
        run(o, q, k, v, scale, bias, lse if keep else None)
    return o, lse


def run(o, q, k, v, scale, bias=None, lse=None, scales=None, by_head=False, in_scale=None):
    """Launch what computes o (B, N, H, d), configured by table or rule; lse (B, H, N) without a
    bias only. Of an o in eight bits `scales` are written by head, (H, B N), or read, (1, 1); of q,
    k and v in eight bits in_scale (1, 1) is read."""
    B, N, H, d = q.shape
    L = k.shape[1]
    _check_spans(q, k, v)
    _, config = _choose(q, L, bias is not None, "triton")
    options = {name: config[name] for name in ("BLOCK_M", "num_warps", "num_stages")}
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    least = LEAST_KEYS[q.element_size()]
    with torch.cuda.device_of(q):
        if config["RESIDENT"]:
            keys = dict(zip(("KEYS_0", "KEYS_1", "KEYS_2"), pieces(L, least), strict=True))
            _attention_resident_kernel[(B * H,)](
                q, k, v, o, lse, scales, in_scale, *strides, B, N, H, scale * LOG2_E, L=L,
                HEAD_DIM=d, BY_HEAD=by_head, **keys, **options,
            )  # fmt: skip
        else:
            _attention_kernel[(B * H * _dispatch.cdiv(N, config["BLOCK_M"]),)](
                q, k, v, bias, o, lse, scales, in_scale, *strides, B, N, H, scale * LOG2_E, L=L,
                HEAD_DIM=d,
                BY_HEAD=by_head, BLOCK_N=config["BLOCK_N"],
                BLOCK_TAIL=tail(L, config["BLOCK_N"], least), **options,
            )  # fmt: skip


@_dispatch.custom_op("deit_fast::attention_quantized")
def _fwd_quantized(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, out_scale: Tensor | None,
    in_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, scales = _alloc_quantized(q, dtype, out_scale)
    if o.numel():
        by_head = out_scale is None
        scaled = {"scales": scales if by_head else out_scale, "by_head": by_head}
        run(o, q, k, v, scale, **scaled, in_scale=in_scale)
    return o, scales


def _alloc_quantized(q, dtype, out_scale):
    """What forward returns: o, and its scales unless they were given. Also its fake."""
    B, N, H, _ = q.shape
    scales = (H, B * N) if out_scale is None else 0
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(scales, dtype=torch.float32)


@_fwd_quantized.register_fake
def _(q, k, v, scale, dtype, out_scale, in_scale):
    return _alloc_quantized(q, dtype, out_scale)


def _check_spans(q, k, v):
    N, L = q.shape[1], k.shape[1]
    if max(N * q.stride(1), L * k.stride(1), L * v.stride(1)) >= 2**31:
        raise ValueError(
            f"attention: one sample of q, k or v spans 2**31 elements ({N} queries, {L} keys)"
        )


@_fwd.register_fake
def _(q, k, v, bias, scale, keep, implementation):
    return _alloc(q, keep)


@_fwd.register_flops
@_fwd_quantized.register_flops
def _(q, k, *args, **kwargs):
    (B, N, H, d), L = q, k[1]
    return 4 * B * H * N * L * d


def run_backward(dq, dk, dv, do, q, k, v, o, lse, scale, sums=False):
    """Launch what computes dq (B, N, H, d), dk and dv (B, L, H, d) of contiguous o and do. With
    `sums` the sums of their rows come back, (3, H, d) in fp32."""
    (B, N, H, d), L = q.shape, k.shape[1]
    config = meta_backward(N, L, q.dtype, _chips.chip(q.device).capability)
    tiles_m, tiles_n = _dispatch.cdiv(N, config["BLOCK_M"]), _dispatch.cdiv(L, config["BLOCK_N"])
    shapes = (B, tiles_m, 1, H, d), (B, tiles_n, 2, H, d)
    parts = [q.new_empty(s, dtype=torch.float32) if sums else None for s in shapes]
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    if B * H:
        with torch.cuda.device_of(q):
            _attention_backward_kernel[(B * H * (tiles_m + tiles_n),)](
                q, k, v, o, do, lse, dq, dk, dv, *parts, *strides, dq.stride(1), dk.stride(1),
                H, scale, N=N, L=L, HEAD_DIM=d, **config,
            )  # fmt: skip
    return torch.cat([t.sum((0, 1)) for t in parts]) if sums else None


@_dispatch.custom_op("deit_fast::attention_backward")
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, N, H, d), dk and dv (B, L, H, d), contiguous; of contiguous do and o."""
    grads = [t.new_empty(t.shape) for t in (q, k, v)]
    run_backward(*grads, do, q, k, v, o, lse, scale)
    return tuple(grads)


@attention_backward.register_fake
def _(do, q, k, v, o, lse, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


@attention_backward.register_flops
def _(do, q, k, *args, **kwargs):
    (B, N, H, d), L = q, k[1]
    return 8 * B * H * N * L * d  # dv, dp, dq, dk


@_dispatch.custom_op("deit_fast::attention_backward_packed")
def attention_backward_packed(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradient of qkv (B, N, 3, H, d), in one piece, and the sums of its rows, (3, H, d) in fp32:
    the gradient of the bias behind it. do and o (B, N, H, d), lse (B, H, N), all contiguous."""
    dqkv = qkv.new_empty(qkv.shape)
    sums = run_backward(*dqkv.unbind(2), do, *qkv.unbind(2), o, lse, scale, sums=True)
    return dqkv, sums


@attention_backward_packed.register_fake
def _(do, qkv, o, lse, scale):
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[2:], dtype=torch.float32)


@attention_backward_packed.register_flops
def _(do, qkv, *args, **kwargs):
    B, N, _, H, d = qkv
    return 8 * B * H * N * N * d


def _save(ctx, inputs, output):
    q, k, v, bias, ctx.scale, keep, _ = inputs
    ctx.save_for_backward(q, k, v, bias, *(output if keep else ()))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the logarithms


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 7
    q, k, v, bias, *rest = ctx.saved_tensors
    if rest and not torch.is_grad_enabled():
        return *attention_backward(do.contiguous(), q, k, v, *rest, ctx.scale), *(None,) * 4
    dtype = q.dtype  # with a bias, or for a second derivative
    q, k, v, do = (t.transpose(1, 2).float() for t in (q, k, v, do))
    s = ctx.scale * q @ k.transpose(-2, -1)
    s = s if bias is None else s + bias.float()
    p = s.softmax(-1).masked_fill(s.amax(-1, keepdim=True) == -torch.inf, 0.0)
    dp = do @ v.transpose(-2, -1)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    grads = ctx.scale * ds @ k, ctx.scale * ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ do
    dbias = None if bias is None else ds.sum(0).to(bias.dtype)
    return *(g.transpose(1, 2).to(dtype) for g in grads), dbias, *(None,) * 3


_fwd.register_autograd(_backward, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`softmax(scale * q k^T + bias) v` for every sample and head.

    q (B, N, H, d); k, v (B, L, H, d), strided views welcome; one of fp32, fp16, bf16 (under
    autocast they are cast to its dtype). `scale` defaults to 1 / sqrt(d). `bias` (H, N, L) is
    added to the scaled scores, the same for every sample. Returns (B, N, H, d), contiguous. The
    Triton kernel takes d = 32, 48, 64 and 80. `implementation`: "auto" | "triton" | "torch". Raises
    ValueError for shapes, devices and head dimensions, TypeError for dtypes that do not fit.
    """
    chosen = _policy.resolve("attention", q, implementation)
    q, k, v, scale = _checked(q, k, v, scale, bias)
    if chosen == "torch":
        return attention_reference(q, k, v, scale, bias)
    q, k, v, scale = _operands(q, k, v, scale)
    bias = None if bias is None else bias.contiguous()
    keep = bias is None and q.shape[3] in TRAINED_HEAD_DIMS and _dispatch.wants_grad(q, k, v)
    return _fwd(q, k, v, bias, scale, keep, implementation)[0]


@_dispatch.inference_only
def attention_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    format: str = "fp8",
    out_scale: Tensor | None = None,
    in_scale: Tensor | None = None,
    implementation: str = "auto",
) -> Quantized:
    """`attention(q, k, v, scale)` with its result, (B, N, H * d), in eight bits: what
    `quantized_linear` reads. Scores, softmax and sums are attention's own.

    Arguments and errors as `attention`. `out_scale` (1, 1) in fp32: one scale for all, of fp8;
    without it each row of each head gets its own. `in_scale` (1, 1): q, k and v are values in
    float8_e4m3fn, which it is the scale of; both products are then of fp8, the softmax's numbers
    rounded to it too, and `scale` is positive. Returns values (B, N, H * d) and scales (H, B N) or
    `out_scale`. No gradient: backward raises. RuntimeError where the chip has no such numbers.
    """
    op = "attention_quantized"
    dtype = storage(op, format)
    if in_scale is None:
        expect_float(op, "q", q)
    else:
        _checks.expect(op, q, torch.float32, in_scale=(in_scale, (1, 1)))
        if q.dtype != torch.float8_e4m3fn or dtype != q.dtype:
            raise TypeError(
                f"{op}: in_scale with a q of {q.dtype} and format {format!r}, expected float8_e4m3fn "
                "and 'fp8'"
            )
        if scale is not None and scale <= 0:
            raise ValueError(f"{op}: scale {scale} with in_scale, expected a positive one")
    chosen = _policy.resolve(op, q, implementation, dtype=dtype)
    q, k, v, scale = _checked(q, k, v, scale)
    expect_scale(op, q, format, out_scale)
    if chosen == "torch":
        return attention_quantized_reference(q, k, v, scale, format, out_scale, in_scale)
    o, scales = _fwd_quantized(*_operands(q, k, v, scale), dtype, out_scale, in_scale)
    return Quantized(o.flatten(2), scales if out_scale is None else out_scale)


def _checked(q, k, v, scale, bias=None):
    """q, k and v in autocast's dtype, and the scale; or the error they deserve."""
    if q.element_size() > 1:
        q, k, v = _checks.cast(_checks.autocast_dtype(q), q, k, v)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"attention: q has shape {tuple(q.shape)} and k {tuple(k.shape)}, "
            "expected (B, N, H, d) and (B, L, H, d)"
        )
    B, N, H, d = q.shape
    L = k.shape[1]
    _checks.expect("attention", q, q.dtype, k=(k, (B, L, H, d)), v=(v, (B, L, H, d)))
    _checks.expect("attention", q, bias=(bias, (H, N, L)))
    if L == 0:
        raise ValueError(f"attention: k has shape {tuple(k.shape)}, expected at least one key")
    return q, k, v, d**-0.5 if scale is None else float(scale)


def _operands(q, k, v, scale):
    """As the kernels take them."""
    d = q.shape[3]
    if d not in HEAD_DIMS:
        raise ValueError(f"attention: head dimension {d}, the Triton kernel takes {HEAD_DIMS}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    return q, k, v, scale
