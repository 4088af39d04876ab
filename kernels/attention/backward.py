"""Backward kernel of attention, its launch, and the same in PyTorch for what it does not serve."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _chips, _dispatch, _plans
from .configs import meta_backward
from .forward import _dims, _row_mask, _rows


@triton.jit
def _queries(
    q_ptr, o_ptr, do_ptr, lse_ptr, first, N, q_row, o_row,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load q, do, delta and the LSE of queries first ... first + BLOCK - 1."""
    q = _rows(q_ptr, first, N, q_row, BLOCK, HEAD_DIM, MASKED)
    do = _rows(do_ptr, first, N, o_row, BLOCK, HEAD_DIM, MASKED)
    o = _rows(o_ptr, first, N, o_row, BLOCK, HEAD_DIM, MASKED)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    rows = first + tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    return q, do, delta, lse


@triton.jit
def _dq_step(
    q, do, lse, delta, dq, k_ptr, v_ptr, first, L, k_row, v_row, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what keys first ... first + BLOCK - 1 contribute to dq."""
    k = _rows(k_ptr, first, L, k_row, BLOCK, HEAD_DIM, MASKED)
    v = _rows(v_ptr, first, L, v_row, BLOCK, HEAD_DIM, MASKED)
    s = tl.dot(q, k.T, input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:  # a key of zeros contributes nothing, unless its p overflows
        p = tl.where((first + tl.arange(0, BLOCK) < L)[None, :], p, 0.0)
    dp = tl.dot(do, v.T, input_precision="ieee")
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee")


@triton.jit
def _dkv_step(
    k, v, dk, dv, q_ptr, o_ptr, do_ptr, lse_ptr, first, N, q_row, o_row, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what queries first ... first + BLOCK - 1 contribute to dk and dv.

    Those from N on have zeros for q and do, and so contribute nothing.
    """
    q, do, delta, lse = _queries(
        q_ptr, o_ptr, do_ptr, lse_ptr, first, N, q_row, o_row, BLOCK, HEAD_DIM, MASKED
    )
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
    """Store a block of dq, dk or dv, and the sum over its rows."""
    rows, dims = first + tl.arange(0, BLOCK), _dims(HEAD_DIM)
    mask = _row_mask(rows < size, HEAD_DIM)
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
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides
    dq_row, dk_row,
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
        q, do, delta, lse = _queries(
            q_ptr, o_ptr, do_ptr, lse_ptr, first, N, q_row, o_row, BLOCK_M, HEAD_DIM, True
        )
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


def run_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    lse: Tensor, scale: float, sums: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Launch the backward kernel.

    Args:
        dq: Output, (B, N, H, d), as a view that may have any strides of sample and row.
        dk: Output, (B, L, H, d), like dq.
        dv: Output, (B, L, H, d), with dk's strides.
        do: Gradient of o, (B, N, H, d), contiguous.
        q: (B, N, H, d), as forward had it.
        k: (B, L, H, d).
        v: (B, L, H, d).
        o: (B, N, H, d), contiguous.
        lse: (B, H, N) in fp32, units of log2.
        scale: Of the scores.
        sums: Whether to sum the gradients over their rows as well.

    Returns:
        With `sums` partial sums over samples and tokens for `column_sums`, in fp32: of dq (P, H d),
        of dk and dv (P', 2 H d). Otherwise None and None.
    """
    (B, N, H, d), L = q.shape, k.shape[1]
    config = meta_backward(N, L, q.dtype, _chips.chip(q.device).capability)
    tiles_m, tiles_n = _dispatch.cdiv(N, config["BLOCK_M"]), _dispatch.cdiv(L, config["BLOCK_N"])
    q_sums = kv_sums = None
    if sums:
        q_sums = q.new_empty((B * tiles_m, H * d), dtype=torch.float32)
        kv_sums = q.new_empty((B * tiles_n, 2 * H * d), dtype=torch.float32)
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    if B * H:
        with torch.cuda.device_of(q):
            _plans.launch(_attention_backward_kernel, (B * H * (tiles_m + tiles_n),),
                q, k, v, o, do, lse, dq, dk, dv, q_sums, kv_sums, *strides, dq.stride(1),
                dk.stride(1), H, scale, N=N, L=L, HEAD_DIM=d, **config,
            )  # fmt: skip
    return q_sums, kv_sums


def backward_torch(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients by PyTorch's operations in fp32, so that autograd can differentiate them again.

    Args:
        do: Gradient of o, (B, N, H, d).
        q: (B, N, H, d).
        k: (B, L, H, d).
        v: (B, L, H, d).
        bias: (H, N, L), or None.
        scale: Of the scores.

    Returns:
        dq, dk and dv in the dtype of q, and dbias in the dtype of the bias, or None.
    """
    dtype = q.dtype
    q, k, v, do = (t.transpose(1, 2).float() for t in (q, k, v, do))
    s = scale * q @ k.transpose(-2, -1)
    s = s if bias is None else s + bias.float()
    # a row whose keys are all masked has no weights, as in the kernel
    p = s.softmax(-1).masked_fill(s.amax(-1, keepdim=True) == -torch.inf, 0.0)
    dp = do @ v.transpose(-2, -1)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    grads = scale * ds @ k, scale * ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ do
    dq, dk, dv = (g.transpose(1, 2).to(dtype) for g in grads)
    dbias = None if bias is None else ds.sum(0).to(bias.dtype)
    return dq, dk, dv, dbias
