"""Backward kernels of talking-heads attention, and their launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _plans
from .configs import configs, sizes
from .forward import (
    _accumulate,
    _bias,
    _load,
    _logits,
    _matmul_nt,
    _mix,
    _per_row,
    _store,
    _weights,
    _zeros,
)


@triton.jit
def _sum_pairs(x, y, sums):
    """Add the sums of x_g * y_h over the tile, for all pairs of heads, to `sums`.

    They are in the layout of `_weights`: (PARTS, SIZE, SIZE), each summed over a part of the tile.
    With one part every warp would hold the whole matrix.
    """
    PARTS: tl.constexpr = sums.shape[0]
    SIZE: tl.constexpr = sums.shape[1]
    shape: tl.constexpr = (SIZE, PARTS, x.shape[0] * x.shape[1] * x.shape[2] // (SIZE * PARTS))
    x = tl.permute(tl.reshape(x, shape), (1, 0, 2))
    y = tl.permute(tl.reshape(y, shape), (1, 2, 0))
    return tl.dot(x, y, sums, input_precision="ieee")


@triton.jit
def _talking_heads_dq_kernel(
    qkv_ptr, wl_ptr, ww_ptr,  # in: (B, N, 3, H, d) (H, H) (H, H)
    do_ptr, lse_ptr,  # in: (B, N, H, d), (B, H, N)
    delta_ptr, dqkv_ptr,  # out: (B, H, N), q's part of (B, N, 3, H, d)
    dwl_ptr, dww_ptr,  # out: (programs, SIZE, SIZE), in the layout of `_weights`
    N, scale,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // tiles, tl.program_id(0) % tiles * BLOCK_M
    ROW: tl.constexpr = 3 * H * D
    qkv_ptr += sample * N * ROW
    k_ptr, v_ptr = qkv_ptr + H * D, qkv_ptr + 2 * H * D
    keys = tl.arange(0, BLOCK_N)[None, None, :]
    q = _load(qkv_ptr, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_M)
    do = _load(do_ptr + sample * N * H * D, first, N, H * D, H, D, SPLIT, HEADS, BLOCK_M)
    offsets, mask = _per_row(first, N, H, HEADS, BLOCK_M)
    lse = tl.load(lse_ptr + sample * H * N + offsets, mask=mask, other=0.0)[:, :, None]
    wl = _weights(wl_ptr, q[0].dtype, H, HEADS, False)
    ww_t = _weights(ww_ptr, q[0].dtype, H, HEADS, True)

    SIZE: tl.constexpr = wl.shape[0]
    PARTS: tl.constexpr = min(HEADS, HEADS * BLOCK_M * BLOCK_N // (16 * SIZE))
    delta = tl.zeros((HEADS, BLOCK_M), tl.float32)
    row_sum = tl.zeros((HEADS, BLOCK_M), tl.float32)  # 1 except for the rounding of lse
    dww = tl.zeros((PARTS, SIZE, SIZE), tl.float32)
    for start in range(0, N, BLOCK_N):
        k = _load(k_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        v = _load(v_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        p = tl.exp2(_logits(_matmul_nt(q, k) * scale, wl) - lse)
        p = tl.where(start + keys < N, p, 0.0)
        da = _matmul_nt(do, v)
        delta += tl.sum(p * _mix(ww_t, da), axis=2)
        row_sum += tl.sum(p, axis=2)
        dww = _sum_pairs(da.to(q[0].dtype), p.to(q[0].dtype), dww)
    delta = delta / row_sum  # so that dt sums to 0: dWl is the sum of dt * s
    tl.store(delta_ptr + sample * H * N + offsets, delta, mask=mask)

    wl_t = _weights(wl_ptr, q[0].dtype, H, HEADS, True)
    dq = _zeros(D, SPLIT, HEADS, BLOCK_M)
    dwl = tl.zeros((PARTS, SIZE, SIZE), tl.float32)
    for start in range(0, N, BLOCK_N):
        k = _load(k_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        v = _load(v_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        s = _matmul_nt(q, k) * scale
        p = tl.exp2(_logits(s, wl) - lse)
        p = tl.where(start + keys < N, p, 0.0)
        dt = p * (_mix(ww_t, _matmul_nt(do, v)) - delta[:, :, None])
        dwl = _sum_pairs(dt.to(q[0].dtype), s.to(q[0].dtype), dwl)
        dq = _accumulate(dq, _mix(wl_t, dt), k)
    dqkv_ptr += sample * N * ROW
    _store(dqkv_ptr, dq, scale, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_M)
    pairs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(dwl_ptr + program * SIZE * SIZE + pairs, tl.sum(dwl, axis=0))
    tl.store(dww_ptr + program * SIZE * SIZE + pairs, tl.sum(dww, axis=0))


@triton.jit
def _talking_heads_dkv_kernel(
    qkv_ptr, wl_ptr, ww_ptr, bw_ptr,  # in: (B, N, 3, H, d) (H, H) (H, H) (H,) or None
    do_ptr, lse_ptr, delta_ptr,  # in: (B, N, H, d), (B, H, N), (B, H, N)
    dqkv_ptr,  # out: k's and v's part of (B, N, 3, H, d)
    N, scale,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles are transposed: (heads, keys, queries).

    Queries from N on have zeros for q and do, and so contribute nothing.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_N
    ROW: tl.constexpr = 3 * H * D
    qkv_ptr += sample * N * ROW
    do_ptr += sample * N * H * D
    lse_ptr += sample * H * N
    delta_ptr += sample * H * N
    k = _load(qkv_ptr + H * D, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
    v = _load(qkv_ptr + 2 * H * D, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
    wl = _weights(wl_ptr, k[0].dtype, H, HEADS, False)
    ww = _weights(ww_ptr, k[0].dtype, H, HEADS, False)
    wl_t = _weights(wl_ptr, k[0].dtype, H, HEADS, True)
    ww_t = _weights(ww_ptr, k[0].dtype, H, HEADS, True)
    bw = _bias(bw_ptr, H, HEADS)
    in_keys = (first + tl.arange(0, BLOCK_N) < N)[None, :, None]
    dk = _zeros(D, SPLIT, HEADS, BLOCK_N)
    dv = _zeros(D, SPLIT, HEADS, BLOCK_N)
    for start in range(0, N, BLOCK_M):
        q = _load(qkv_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_M)
        do = _load(do_ptr, start, N, H * D, H, D, SPLIT, HEADS, BLOCK_M)
        offsets, mask = _per_row(start, N, H, HEADS, BLOCK_M)
        lse = tl.load(lse_ptr + offsets, mask=mask, other=0.0)[:, None, :]
        delta = tl.load(delta_ptr + offsets, mask=mask, other=0.0)[:, None, :]
        p = tl.where(in_keys, tl.exp2(_logits(_matmul_nt(k, q) * scale, wl) - lse), 0.0)
        a = _mix(ww, p) + bw
        dv = _accumulate(dv, a, do)
        dt = p * (_mix(ww_t, _matmul_nt(v, do)) - delta)
        dk = _accumulate(dk, _mix(wl_t, dt), q)
    dqkv_ptr += sample * N * ROW + H * D
    _store(dqkv_ptr, dk, scale, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
    _store(dqkv_ptr + H * D, dv, 1.0, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)


def run_backward(
    dqkv: Tensor, dwl: Tensor, dww: Tensor, do: Tensor, qkv: Tensor, wl: Tensor, ww: Tensor,
    bw: Tensor | None, lse: Tensor, scale: float,
) -> None:  # fmt: skip
    """Launch the backward kernels, and sum what their programs leave of dWl and dWw.

    Args:
        dqkv: Output, (B, N, 3, H, d), contiguous.
        dwl: Output, (H, H) in fp32.
        dww: Output, (H, H) in fp32.
        do: Gradient of o, (B, N, H, d), contiguous.
        qkv: (B, N, 3, H, d), contiguous.
        wl: Weight of the mixing before the softmax, (H, H), contiguous.
        ww: Weight of the mixing after it, (H, H), contiguous.
        bw: Bias of the mixing after it, (H,), or None.
        lse: (B, H, N) in fp32, units of log2.
        scale: Of the scores.
    """
    B, N, _, H, d = qkv.shape
    _, dq_config, dkv_config = configs(H, qkv.dtype)
    shared = sizes(H, d)
    HEADS, programs = shared["HEADS"], B * _dispatch.cdiv(N, dq_config["BLOCK_M"])
    SIZE = max(16, HEADS)
    delta = torch.empty_like(lse)
    pairs = qkv.new_empty(2, programs, SIZE, SIZE, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _plans.launch(
            _talking_heads_dq_kernel, (programs,),
            qkv, wl, ww, do, lse, delta, dqkv, *pairs, N, scale, **shared, **dq_config,
        )  # fmt: skip
        _plans.launch(
            _talking_heads_dkv_kernel, (B * _dispatch.cdiv(N, dkv_config["BLOCK_N"]),),
            qkv, wl, ww, bw, do, lse, delta, dqkv, N, scale, **shared, **dkv_config,
        )  # fmt: skip
    # Pairs of heads are in the layout of W (x) I: only the diagonals pair a part with itself.
    pairs = pairs.sum(1).view(2, HEADS, SIZE // HEADS, HEADS, SIZE // HEADS)
    pairs = pairs.diagonal(dim1=2, dim2=4).sum(-1)[:, :H, :H]
    dwl.copy_(pairs[0])
    dww.copy_(pairs[1])
