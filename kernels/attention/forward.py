"""Forward kernels of attention, and their launch.

Two kernels: one with an online softmax over blocks of keys, and one that keeps all keys and values
of a head on the SM (K/V resident). `configs.py` says which serves a shape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _plans
from ..quantize import _round, _scales
from .configs import LEAST_KEYS, choose, pieces, tail

LOG2_E = 1.4426950408889634


@triton.jit
def _dims(HEAD_DIM: tl.constexpr):
    """Feature indices of a head, padded to a power of two: 80 become 128.

    Every access masks the padding.
    """
    return tl.arange(0, triton.next_power_of_2(HEAD_DIM))


@triton.jit
def _row_mask(in_rows, HEAD_DIM: tl.constexpr):
    """Mask (rows, features): rows that exist, without the padding of features."""
    dims = _dims(HEAD_DIM)
    mask = in_rows[:, None]
    if HEAD_DIM < dims.shape[0]:
        mask = mask & (dims < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _accumulate_pv(p, v, acc):
    """Return acc + p v, p rounded to v's dtype.

    p lies in [0, 1]. For e4m3 it is multiplied by 256, so that less of it underflows;
    `_dequantized` divides by that.
    """
    if v.dtype == tl.float8e4nv:
        p = p * 256.0
    return tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")


@triton.jit
def _dequantized(acc, v_ptr, in_scale_ptr):
    """The sum of `_accumulate_pv`, times the scale of a quantized v."""
    if in_scale_ptr is not None:
        acc *= tl.load(in_scale_ptr) / (256.0 if v_ptr.dtype.element_ty == tl.float8e4nv else 1.0)
    return acc


@triton.jit
def _store_rows(o_ptrs, scales_ptr, o, mask, in_rows, row, PER_HEAD: tl.constexpr):
    """Store rows of one head's o.

    With scales_ptr they are quantized: PER_HEAD with a scale for each row of the head, stored at
    `row`, otherwise by the per-tensor scale found there.
    """
    if scales_ptr is not None:
        INT8: tl.constexpr = o_ptrs.dtype.element_ty == tl.int8
        if PER_HEAD:
            scales, inverse = _scales(o, INT8)
            tl.store(scales_ptr + row, scales, mask=in_rows)
            o = _round(o, inverse[:, None], INT8)
        else:
            o = _round(o, 1.0 / tl.load(scales_ptr), INT8)
    tl.store(o_ptrs, o, mask=mask)


@triton.jit
def _attend(
    q, acc, row_max, row_sum, k_ptr, v_ptr, bias_ptrs, first, L, k_row, v_row, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys first ... first + BLOCK - 1."""
    keys = first + tl.arange(0, BLOCK)
    dims = _dims(HEAD_DIM)
    in_keys = keys < L
    k_ptrs = k_ptr + keys[None, :] * k_row + dims[:, None]
    v_ptrs = v_ptr + keys[:, None] * v_row + dims[None, :]
    if HEAD_DIM < dims.shape[0]:
        in_dims = dims < HEAD_DIM
        k = tl.load(k_ptrs, mask=in_keys[None, :] & in_dims[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=in_keys[:, None] & in_dims[None, :], other=0.0)
    elif MASKED:
        k = tl.load(k_ptrs, mask=in_keys[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=in_keys[:, None], other=0.0)
    else:
        k, v = tl.load(k_ptrs), tl.load(v_ptrs)

    s = tl.dot(q, k, input_precision="ieee")
    if bias_ptrs is not None:
        bias = tl.load(bias_ptrs + keys[None, :], mask=in_keys[None, :], other=0.0)
        s = s * scale + bias.to(tl.float32) * 1.4426950408889634  # log2(e)
        scale = 1.0
    if MASKED:
        s = tl.where(in_keys[None, :], s, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(s, axis=1))
    # if the bias masks all keys of a row so far: -inf - -inf would be NaN
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s * scale - (shift * scale)[:, None])  # one FMA: the scale is positive
    decay = tl.exp2((row_max - shift) * scale)
    row_sum = row_sum * decay + tl.sum(p, axis=1)
    return _accumulate_pv(p, v, acc * decay[:, None]), new_max, row_sum


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # in: (B, N, H, d) (B, L, H, d) (B, L, H, d) (H, N, L) or None
    o_ptr, lse_ptr,  # out: (B, N, H, d), contiguous, (B, H, N) or None, never with a bias
    scales_ptr,  # quantized o; PER_HEAD: out (H, B, N), otherwise: in (1, 1)
    in_scale_ptr,  # quantized q, k and v; in: (1, 1)
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides
    B, N, H, scale,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)  # a grid of one dimension: the others are limited to 65535 programs
    head = ((pid // tiles) % H).to(tl.int64)
    sample = (pid // (tiles * H)).to(tl.int64)  # int64, as head: strides may exceed 2**31
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = _dims(HEAD_DIM)
    in_rows = rows < N
    mask = _row_mask(in_rows, HEAD_DIM)

    if in_scale_ptr is not None:
        # not 0: a masked score of -inf times 0 would be NaN
        scale *= tl.maximum(tl.load(in_scale_ptr) * tl.load(in_scale_ptr), 1e-30)
    q_offs = sample * q_batch + head * q_head + rows[:, None] * q_row + dims[None, :]
    q = tl.load(q_ptr + q_offs, mask=mask, other=0.0)
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    if bias_ptr is not None:
        # rows beyond N read row 0; their result is not stored
        safe_rows = tl.where(in_rows, rows, 0).to(tl.int64)
        bias_ptrs = bias_ptr + (head * N + safe_rows)[:, None] * L
    else:
        bias_ptrs = None

    acc = tl.zeros((BLOCK_M, dims.shape[0]), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    # Whole blocks without masks, then a tail just wide enough: 198 keys = 3 * 64 + 6 cost 208.
    WHOLE: tl.constexpr = L // BLOCK_N * BLOCK_N
    for first in range(0, WHOLE, BLOCK_N):
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, k_ptr, v_ptr, bias_ptrs, first, L, k_row, v_row, scale,
            BLOCK_N, HEAD_DIM, False,
        )  # fmt: skip
    if L > WHOLE:
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, k_ptr, v_ptr, bias_ptrs, WHOLE, L, k_row, v_row, scale,
            BLOCK_TAIL, HEAD_DIM, True,
        )  # fmt: skip

    o_offs = ((sample * N + rows[:, None]) * H + head) * HEAD_DIM + dims[None, :]
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # every key masked: 0, as in PyTorch
    if lse_ptr is not None:
        lse_ptrs = lse_ptr + (sample * H + head) * N + rows
        tl.store(lse_ptrs, row_max * scale + tl.log2(row_sum), mask=in_rows)
    o = _dequantized(acc, v_ptr, in_scale_ptr) / row_sum[:, None]
    scale_row = (head * B + sample) * N + rows
    _store_rows(o_ptr + o_offs, scales_ptr, o, mask, in_rows, scale_row, PER_HEAD)


@triton.jit
def _rows(ptr, first, size, row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Load rows first ... first + BLOCK - 1 of one head; zeros from `size` on."""
    rows, dims = first + tl.arange(0, BLOCK), _dims(HEAD_DIM)
    ptrs = ptr + rows[:, None] * row + dims[None, :]
    if MASKED or HEAD_DIM < dims.shape[0]:
        return tl.load(ptrs, mask=_row_mask(rows < size, HEAD_DIM), other=0.0)
    return tl.load(ptrs)


@triton.jit
def _scores(q, k, first, L: tl.constexpr, BLOCK: tl.constexpr):
    """Return q k^T for keys first ... first + BLOCK - 1, unscaled; -inf from L on."""
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
    KEYS_2: tl.constexpr, HEAD_DIM: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """One program per head, with its keys and values resident.

    They are read once, as two or three blocks that stay on the SM. Each block of queries gets one
    softmax over all of them.
    """
    head = (tl.program_id(0) % H).to(tl.int64)
    sample = (tl.program_id(0) // H).to(tl.int64)  # int64, as head: strides may exceed 2**31
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    o_ptr += (sample * N * H + head) * HEAD_DIM
    if in_scale_ptr is not None:
        # not 0: a masked score of -inf times 0 would be NaN
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
        row_max = tl.maximum(tl.max(s0, axis=1), tl.max(s1, axis=1))
        if KEYS_2:
            s2 = _scores(q, k2, THIRD, L, KEYS_2)
            row_max = tl.maximum(row_max, tl.max(s2, axis=1))
        row_max *= scale  # positive
        p0, p1 = tl.exp2(s0 * scale - row_max[:, None]), tl.exp2(s1 * scale - row_max[:, None])
        row_sum = tl.sum(p0, axis=1) + tl.sum(p1, axis=1)
        acc = _accumulate_pv(p0, v0, None)
        acc = _accumulate_pv(p1, v1, acc)
        if KEYS_2:
            p2 = tl.exp2(s2 * scale - row_max[:, None])
            row_sum += tl.sum(p2, axis=1)
            acc = _accumulate_pv(p2, v2, acc)
        o_ptrs = o_ptr + rows[:, None] * (H * HEAD_DIM) + dims[None, :]
        scale_row = (head * B + sample) * N + rows
        _store_rows(
            o_ptrs, scales_ptr, _dequantized(acc, v_ptr, in_scale_ptr) / row_sum[:, None],
            _row_mask(in_rows, HEAD_DIM), in_rows, scale_row, PER_HEAD,
        )  # fmt: skip
        if lse_ptr is not None:
            lse_ptrs = lse_ptr + (sample * H + head) * N + rows
            tl.store(lse_ptrs, row_max + tl.log2(row_sum), mask=in_rows)


def run(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None,
    lse: Tensor | None = None, scales: Tensor | None = None, per_head: bool = False,
    in_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the forward kernel that a tuned table or the rule chooses.

    Args:
        o: Output, (B, N, H, d), contiguous.
        q: (B, N, H, d), as `attention` takes it.
        k: (B, L, H, d).
        v: (B, L, H, d).
        scale: Of the scores, positive.
        bias: (H, N, L), contiguous.
        lse: Output, (B, H, N) in fp32, units of log2. Not with a bias.
        scales: Of a quantized o, in fp32. With `per_head` an output, (H, B N); otherwise the
            per-tensor scale (1, 1), which is read.
        per_head: Whether each row of each head gets its own scale.
        in_scale: For quantized q, k and v: their scale, (1, 1) in fp32.

    Raises:
        ValueError: If a sample of q, k or v spans 2**31 elements.
    """
    B, N, H, d = q.shape
    L = k.shape[1]
    _check_spans(q, k, v)
    _, config = choose(q, L, bias is not None, "triton")
    options = {name: config[name] for name in ("BLOCK_M", "num_warps", "num_stages")}
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    least = LEAST_KEYS[q.element_size()]
    with torch.cuda.device_of(q):
        if config["RESIDENT"]:
            keys = dict(zip(("KEYS_0", "KEYS_1", "KEYS_2"), pieces(L, least), strict=True))
            _plans.launch(_attention_resident_kernel, (B * H,),
                q, k, v, o, lse, scales, in_scale, *strides, B, N, H, scale * LOG2_E, L=L,
                HEAD_DIM=d, PER_HEAD=per_head, **keys, **options,
            )  # fmt: skip
        else:
            _plans.launch(_attention_kernel, (B * H * _dispatch.cdiv(N, config["BLOCK_M"]),),
                q, k, v, bias, o, lse, scales, in_scale, *strides, B, N, H, scale * LOG2_E, L=L,
                HEAD_DIM=d, PER_HEAD=per_head, BLOCK_N=config["BLOCK_N"],
                BLOCK_TAIL=tail(L, config["BLOCK_N"], least), **options,
            )  # fmt: skip


def _check_spans(q: Tensor, k: Tensor, v: Tensor) -> None:
    N, L = q.shape[1], k.shape[1]
    if max(N * q.stride(1), L * k.stride(1), L * v.stride(1)) >= 2**31:
        raise ValueError(
            f"attention: one sample of q, k or v spans 2**31 elements ({N} queries, {L} keys)"
        )
