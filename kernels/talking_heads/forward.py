"""Forward kernel of talking-heads attention, its launch, and device functions backward shares.

A tile is (HEADS, queries, keys): all heads of one block of queries and one of keys, padded to a
power of two of heads. The d features of a head are two tensors (`SPLITS`): 48 = 32 + 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _plans
from .configs import configs, sizes


@triton.jit
def _weights(ptr, dtype: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr):
    """W (x) I of at least 16 x 16, or with T its transpose: the left operand of `_mix`."""
    SIZE: tl.constexpr = 16 if HEADS < 16 else HEADS
    REPEAT: tl.constexpr = SIZE // HEADS
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    g, h = rows // REPEAT, columns // REPEAT
    mask = (rows % REPEAT == columns % REPEAT) & (g < H) & (h < H)
    return tl.load(ptr + (h * H + g if T else g * H + h), mask=mask, other=0.0).to(dtype)


@triton.jit
def _bias(ptr, H: tl.constexpr, HEADS: tl.constexpr):
    """The bias of a mixing, (HEADS, 1, 1); zeros without one."""
    bias = tl.zeros((HEADS,), tl.float32)
    if ptr is not None:
        heads = tl.arange(0, HEADS)
        bias = tl.load(ptr + heads, mask=heads < H, other=0.0).to(tl.float32)
    return bias[:, None, None]


@triton.jit
def _as_matrix(x, w):
    """The tile x (HEADS, n, m) as w's right operand.

    A row is a head; with fewer than 16 heads, an equal part of one.
    """
    return tl.reshape(x, (w.shape[0], x.shape[0] * x.shape[1] * x.shape[2] // w.shape[0]))


@triton.jit
def _mix(w, x):
    """Mix the heads of the tile x with w from `_weights`."""
    mixed = tl.dot(w, _as_matrix(x, w).to(w.dtype), input_precision="ieee")
    return tl.reshape(mixed, x.shape)


@triton.jit
def _tokens(first, N, row, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
           ROWS: tl.constexpr):  # fmt: skip
    """Offsets and mask of tokens first ... first + ROWS - 1 of all heads, (HEADS, ROWS, 1)."""
    head = tl.arange(0, HEADS)[:, None, None]
    token = first + tl.arange(0, ROWS)[None, :, None]
    return token * row + head * D, (head < H) & (token < N)


@triton.jit
def _load(ptr, first, N, row, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
          HEADS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Load tokens of q, k, v or do: features 0 ... SPLIT - 1, and the others."""
    offsets, mask = _tokens(first, N, row, H, D, HEADS, ROWS)
    low, high = tl.arange(0, SPLIT)[None, None, :], tl.arange(0, D - SPLIT)[None, None, :]
    return (
        tl.load(ptr + offsets + low, mask=mask, other=0.0),
        tl.load(ptr + offsets + SPLIT + high, mask=mask, other=0.0),
    )


@triton.jit
def _store(ptr, x, factor, first, N, row, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
           HEADS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Store x * factor where `_load` would have read it."""
    offsets, mask = _tokens(first, N, row, H, D, HEADS, ROWS)
    low, high = tl.arange(0, SPLIT)[None, None, :], tl.arange(0, D - SPLIT)[None, None, :]
    tl.store(ptr + offsets + low, x[0] * factor, mask=mask)
    tl.store(ptr + offsets + SPLIT + high, x[1] * factor, mask=mask)


@triton.jit
def _zeros(D: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """An accumulator for ROWS tokens of all heads, split like `_load`'s result."""
    low = tl.zeros((HEADS, ROWS, SPLIT), tl.float32)
    return low, tl.zeros((HEADS, ROWS, D - SPLIT), tl.float32)


@triton.jit
def _matmul_nt(q, k):
    """Return q k^T of every head: (HEADS, rows of q, rows of k)."""
    s = tl.dot(q[0], tl.permute(k[0], (0, 2, 1)), input_precision="ieee")
    return tl.dot(q[1], tl.permute(k[1], (0, 2, 1)), s, input_precision="ieee")


@triton.jit
def _accumulate(acc, a, v):
    """Return acc + a v of every head, a rounded to v's dtype."""
    a = a.to(v[0].dtype)
    low = tl.dot(a, v[0], acc[0], input_precision="ieee")
    return low, tl.dot(a, v[1], acc[1], input_precision="ieee")


@triton.jit
def _per_row(first, N, H: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Offsets and mask of tokens first ... first + ROWS - 1 in a sample's (H, N) statistics."""
    head, token = tl.arange(0, HEADS)[:, None], first + tl.arange(0, ROWS)[None, :]
    return head * N + token, (head < H) & (token < N)


@triton.jit
def _logits(s, wl):
    """Mixed scores in units of log2, for exp2."""
    return _mix(wl, s) * 1.4426950408889634  # log2(e)


@triton.jit
def _talking_heads_kernel(
    qkv_ptr, wl_ptr, ww_ptr, bw_ptr,  # in: (B, N, 3, H, d) (H, H) (H, H) (H,) or None
    o_ptr, lse_ptr,  # out: (B, N, H, d), (B, H, N) or None
    N, scale,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    ROW: tl.constexpr = 3 * H * D
    qkv_ptr += sample * N * ROW
    k_ptr, v_ptr = qkv_ptr + H * D, qkv_ptr + 2 * H * D
    keys = tl.arange(0, BLOCK_N)[None, None, :]
    q = _load(qkv_ptr, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_M)
    wl = _weights(wl_ptr, q[0].dtype, H, HEADS, False)

    row_max = tl.full((HEADS, BLOCK_M), float("-inf"), tl.float32)
    row_sum = tl.zeros((HEADS, BLOCK_M), tl.float32)
    for start in range(0, N, BLOCK_N):
        k = _load(k_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        t = tl.where(start + keys < N, _logits(_matmul_nt(q, k) * scale, wl), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(t, axis=2))
        row_sum = row_sum * tl.exp2(row_max - new_max)
        row_sum += tl.sum(tl.exp2(t - new_max[:, :, None]), axis=2)
        row_max = new_max
    lse = row_max + tl.log2(row_sum)
    if lse_ptr is not None:
        offsets, mask = _per_row(first, N, H, HEADS, BLOCK_M)
        tl.store(lse_ptr + sample * H * N + offsets, lse, mask=mask)

    ww = _weights(ww_ptr, q[0].dtype, H, HEADS, False)
    bw = _bias(bw_ptr, H, HEADS)
    acc = _zeros(D, SPLIT, HEADS, BLOCK_M)
    for start in range(0, N, BLOCK_N):
        k = _load(k_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        v = _load(v_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        p = tl.exp2(_logits(_matmul_nt(q, k) * scale, wl) - lse[:, :, None])
        p = tl.where(start + keys < N, p, 0.0)  # exp2 of a key of zeros may overflow
        a = _mix(ww, p) + bw
        acc = _accumulate(acc, a, v)
    _store(o_ptr + sample * N * H * D, acc, 1.0, first, N, H * D, H, D, SPLIT, HEADS, BLOCK_M)


def run(
    o: Tensor, lse: Tensor | None, qkv: Tensor, wl: Tensor, ww: Tensor, bw: Tensor | None,
    scale: float,
) -> None:  # fmt: skip
    """Launch the forward kernel.

    Args:
        o: Output, (B, N, H, d), contiguous.
        lse: Output or None, (B, H, N) in fp32, units of log2.
        qkv: (B, N, 3, H, d), contiguous.
        wl: Weight of the mixing before the softmax, (H, H), contiguous.
        ww: Weight of the mixing after it, (H, H), contiguous.
        bw: Bias of the mixing after it, (H,), or None.
        scale: Of the scores.
    """
    B, N, _, H, d = qkv.shape
    config = configs(H, qkv.dtype)[0]
    with torch.cuda.device_of(qkv):
        _plans.launch(
            _talking_heads_kernel, (B * _dispatch.cdiv(N, config["BLOCK_M"]),),
            qkv, wl, ww, bw, o, lse, N, scale, **sizes(H, d), **config,
        )  # fmt: skip
