"""Forward kernel of window attention, its launch, and device functions backward shares."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _plans
from .configs import meta

LOG2_E = 1.4426950408889634


@triton.jit
def _start(program, Y, X, H, TILES: tl.constexpr, WINDOW: tl.constexpr):
    """Tile, head and first token of a program's window; int64, as maps may exceed 2**31."""
    tile, head = program % TILES, program // TILES % H
    window = tl.cast(program // (TILES * H), tl.int64)
    across, down = X // WINDOW, Y // WINDOW
    row, column = window // across, window % across  # row of windows, counted over all samples
    sample = row // down
    first = (sample * Y + row % down * WINDOW) * X + column * WINDOW
    return tile, head, first


@triton.jit
def _tokens(start, X, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Tokens start ... start + BLOCK - 1 of a window: y, x, position in the map, and the mask.

    Tokens beyond the window have the position of its last one.
    """
    n = start + tl.arange(0, BLOCK)
    in_window = n < WINDOW * WINDOW
    n = tl.minimum(n, WINDOW * WINDOW - 1)
    y, x = n // WINDOW, n % WINDOW
    return y, x, y * X + x, in_window


@triton.jit
def _load(ptr, position, in_window, row, HEAD_DIM: tl.constexpr):
    """Load one head's features of tokens at `position`, from rows that are `row` elements apart."""
    dims = tl.arange(0, HEAD_DIM)
    return tl.load(
        ptr + position[:, None] * row + dims[None, :], mask=in_window[:, None], other=0.0
    )


@triton.jit
def _store(ptr, value, position, in_window, row, HEAD_DIM: tl.constexpr):
    dims = tl.arange(0, HEAD_DIM)
    tl.store(ptr + position[:, None] * row + dims[None, :], value, mask=in_window[:, None])


@triton.jit
def _scores(q, k, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale, WINDOW: tl.constexpr):
    """Scores (queries, keys) in units of log2; -inf for keys beyond the window."""
    s = tl.dot(q, k.T, input_precision="ieee") * scale
    offset = tl.abs(y_q[:, None] - y_k[None, :]) * WINDOW + tl.abs(x_q[:, None] - x_k[None, :])
    s += tl.load(bias_ptr + offset).to(tl.float32) * 1.4426950408889634  # log2(e)
    return tl.where(in_keys[None, :], s, float("-inf"))


@triton.jit
def _window_attention_kernel(
    qkv_ptr, bias_ptr,  # in: (B, Y, X, H, 3, d), (H, W * W)
    o_ptr, lse_ptr,  # out: (B, Y, X, H, d), (B, Y, X, H) or None
    Y, X, H, scale,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (L + BLOCK_M - 1) // BLOCK_M
    tile, head, first = _start(tl.program_id(0), Y, X, H, TILES, WINDOW)
    q_ptr = qkv_ptr + (first * H + head) * 3 * HEAD_DIM
    row = H * 3 * HEAD_DIM
    bias_ptr += head * L
    y_q, x_q, position, in_window = _tokens(tile * BLOCK_M, X, BLOCK_M, WINDOW)
    q = _load(q_ptr, position, in_window, row, HEAD_DIM)

    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, L, BLOCK_N):
        y_k, x_k, key, in_keys = _tokens(start, X, BLOCK_N, WINDOW)
        k = _load(q_ptr + HEAD_DIM, key, in_keys, row, HEAD_DIM)
        v = _load(q_ptr + 2 * HEAD_DIM, key, in_keys, row, HEAD_DIM)
        s = _scores(q, k, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale, WINDOW)
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        p = tl.exp2(s - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        row_max = new_max

    position = first + position
    _store(
        o_ptr + head * HEAD_DIM, acc / row_sum[:, None], position, in_window, H * HEAD_DIM, HEAD_DIM
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + position * H + head, row_max + tl.log2(row_sum), mask=in_window)


def run(
    o: Tensor, lse: Tensor | None, qkv: Tensor, biases: Tensor, window: int, scale: float
) -> None:
    """Launch the forward kernel.

    Args:
        o: Output, (B, Y, X, H, d), contiguous.
        lse: Output or None, (B, Y, X, H) in fp32, units of log2.
        qkv: (B, Y, X, H, 3, d), contiguous.
        biases: (H, W^2), contiguous.
        window: Side of a window, W tokens.
        scale: Of the scores.
    """
    _, Y, X, H, _, d = qkv.shape
    config = meta(qkv.dtype)
    grid = (num_windows(qkv, window) * H * _dispatch.cdiv(window**2, config["BLOCK_M"]),)
    with torch.cuda.device_of(qkv):
        _plans.launch(
            _window_attention_kernel, grid,
            qkv, biases, o, lse, Y, X, H, scale * LOG2_E, WINDOW=window, HEAD_DIM=d, **config,
        )  # fmt: skip


def num_windows(qkv: Tensor, window: int) -> int:
    """Windows of side `window` in all samples of qkv (B, Y, X, H, 3, d)."""
    B, Y, X = qkv.shape[:3]
    return B * (Y // window) * (X // window)
