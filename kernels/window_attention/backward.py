"""Backward kernels of window attention, their launch, and a forward to differentiate twice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _chips, _dispatch, _plans
from .configs import BIASES_META, meta_backward
from .forward import _load, _scores, _start, _store, _tokens, num_windows
from .reference import merge_windows, offsets, split_windows


@triton.jit
def _queries(
    q_ptr, o_ptr, do_ptr, lse_ptr, start, X, H,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Load q, do, delta and the LSE of a block of queries, and where they are.

    Rows beyond the window have zeros for q and do, and so contribute nothing.
    """
    y, x, position, in_window = _tokens(start, X, BLOCK, WINDOW)
    q = _load(q_ptr, position, in_window, H * 3 * HEAD_DIM, HEAD_DIM)
    do = _load(do_ptr, position, in_window, H * HEAD_DIM, HEAD_DIM)
    o = _load(o_ptr, position, in_window, H * HEAD_DIM, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + position * H, mask=in_window, other=float("inf"))
    return q, do, delta, lse, y, x, position, in_window


@triton.jit
def _p_and_ds(
    q, k, v, do, delta, lse, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale, WINDOW: tl.constexpr
):
    """Softmax of a block and the gradient of its scores, both (queries, keys) in fp32."""
    s = _scores(q, k, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale, WINDOW)
    p = tl.exp2(s - lse[:, None])
    dp = tl.dot(do, v.T, input_precision="ieee")
    return p, p * (dp - delta[:, None])


@triton.jit
def _window_attention_backward_kernel(
    qkv_ptr, bias_ptr, o_ptr, do_ptr, lse_ptr,  # in: as forward; o and do (B, Y, X, H, d)
    dqkv_ptr,  # out: (B, Y, X, H, 3, d)
    Y, X, H, scale,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A program owns a block of keys and computes dk and dv, or one of queries and computes dq."""
    L: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (L + BLOCK - 1) // BLOCK
    tile, head, first = _start(tl.program_id(0), Y, X, H, 2 * TILES, WINDOW)
    row = H * 3 * HEAD_DIM
    q_ptr = qkv_ptr + (first * H + head) * 3 * HEAD_DIM
    dq_ptr = dqkv_ptr + (first * H + head) * 3 * HEAD_DIM
    o_ptr += (first * H + head) * HEAD_DIM
    do_ptr += (first * H + head) * HEAD_DIM
    lse_ptr += first * H + head
    bias_ptr += head * L
    scale2 = scale * 1.4426950408889634  # log2(e)
    if tile < TILES:
        y_k, x_k, key, in_keys = _tokens(tile * BLOCK, X, BLOCK, WINDOW)
        k = _load(q_ptr + HEAD_DIM, key, in_keys, row, HEAD_DIM)
        v = _load(q_ptr + 2 * HEAD_DIM, key, in_keys, row, HEAD_DIM)
        dk = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
        dv = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
        for start in range(0, L, BLOCK):
            q, do, delta, lse, y_q, x_q, _, _ = _queries(
                q_ptr, o_ptr, do_ptr, lse_ptr, start, X, H, BLOCK, WINDOW, HEAD_DIM
            )
            p, ds = _p_and_ds(
                q, k, v, do, delta, lse, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale2, WINDOW
            )
            dv = tl.dot(p.to(do.dtype).T, do, dv, input_precision="ieee")
            dk = tl.dot(ds.to(q.dtype).T, q, dk, input_precision="ieee")
        _store(dq_ptr + HEAD_DIM, dk * scale, key, in_keys, row, HEAD_DIM)
        _store(dq_ptr + 2 * HEAD_DIM, dv, key, in_keys, row, HEAD_DIM)
    else:
        q, do, delta, lse, y_q, x_q, query, in_queries = _queries(
            q_ptr, o_ptr, do_ptr, lse_ptr, (tile - TILES) * BLOCK, X, H, BLOCK, WINDOW, HEAD_DIM
        )
        dq = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
        for start in range(0, L, BLOCK):
            y_k, x_k, key, in_keys = _tokens(start, X, BLOCK, WINDOW)
            k = _load(q_ptr + HEAD_DIM, key, in_keys, row, HEAD_DIM)
            v = _load(q_ptr + 2 * HEAD_DIM, key, in_keys, row, HEAD_DIM)
            _, ds = _p_and_ds(
                q, k, v, do, delta, lse, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale2, WINDOW
            )
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        _store(dq_ptr, dq * scale, query, in_queries, row, HEAD_DIM)


@triton.jit
def _window_attention_scores_kernel(
    qkv_ptr, bias_ptr, o_ptr, do_ptr, lse_ptr,  # in: as backward
    ds_ptr,  # out: (chunks, H, L, L) in fp32
    windows, chunks, Y, X, H, scale,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of scores, summed over every `chunks`-th window."""
    L: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (L + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    column, tile, head = pid % TILES, pid // TILES % TILES, pid // (TILES * TILES) % H
    chunk = pid // (TILES * TILES * H)
    row = H * 3 * HEAD_DIM
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    y_k, x_k, key, in_keys = _tokens(column * BLOCK, X, BLOCK, WINDOW)
    for window in range(chunk, windows, chunks):
        _, _, first = _start(window, Y, X, 1, 1, WINDOW)
        q_ptr = qkv_ptr + (first * H + head) * 3 * HEAD_DIM
        at = (first * H + head) * HEAD_DIM
        k = _load(q_ptr + HEAD_DIM, key, in_keys, row, HEAD_DIM)
        v = _load(q_ptr + 2 * HEAD_DIM, key, in_keys, row, HEAD_DIM)
        q, do, delta, lse, y_q, x_q, _, _ = _queries(
            q_ptr, o_ptr + at, do_ptr + at, lse_ptr + first * H + head, tile * BLOCK, X, H,
            BLOCK, WINDOW, HEAD_DIM,
        )  # fmt: skip
        _, ds = _p_and_ds(
            q, k, v, do, delta, lse, bias_ptr + head * L, y_q, x_q, y_k, x_k, in_keys,
            scale * 1.4426950408889634, WINDOW,
        )  # fmt: skip
        acc += ds
    rows, cols = tile * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    ds_ptr += (chunk * H + head).to(tl.int64) * L * L
    tl.store(
        ds_ptr + rows[:, None] * L + cols[None, :], acc,
        mask=(rows < L)[:, None] & (cols < L)[None, :],
    )  # fmt: skip


@triton.jit
def _window_attention_biases_kernel(
    ds_ptr,  # in: (H, L, L) in fp32
    dbias_ptr,  # out: (H, L) in fp32
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one bias: the sum of ds over the pairs that are (+-i, +-j) apart."""
    L: tl.constexpr = WINDOW * WINDOW
    offset = tl.program_id(0) % L
    i, j = offset // WINDOW, offset % WINDOW
    ds_ptr += (tl.program_id(0) // L).to(tl.int64) * L * L
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, L, BLOCK):
        y, x, token, in_window = _tokens(start, WINDOW, BLOCK, WINDOW)
        for signs in tl.static_range(4):
            to_y = y - i if signs % 2 else y + i
            to_x = x - j if signs // 2 else x + j
            there = in_window & (to_y >= 0) & (to_y < WINDOW) & (to_x >= 0) & (to_x < WINDOW)
            if signs % 2:  # +0 and -0 are the same pair
                there = there & (to_y < y)
            if signs // 2:
                there = there & (to_x < x)
            acc += tl.load(ds_ptr + token * L + to_y * WINDOW + to_x, mask=there, other=0.0)
    tl.store(dbias_ptr + tl.program_id(0), tl.sum(acc, axis=0))


def run_backward(
    dqkv: Tensor, dbiases: Tensor | None, do: Tensor, qkv: Tensor, biases: Tensor, o: Tensor,
    lse: Tensor, window: int, scale: float,
) -> None:  # fmt: skip
    """Launch the backward kernels.

    Args:
        dqkv: Output, (B, Y, X, H, 3, d), contiguous.
        dbiases: Output or None, (H, W^2) in fp32.
        do: Gradient of o, (B, Y, X, H, d), contiguous.
        qkv: (B, Y, X, H, 3, d), contiguous.
        biases: (H, W^2), contiguous.
        o: (B, Y, X, H, d), contiguous.
        lse: (B, Y, X, H) in fp32, units of log2.
        window: Side of a window, W tokens.
        scale: Of the scores.
    """
    _, Y, X, H, _, d = qkv.shape
    L, windows = window**2, num_windows(qkv, window)
    chip = _chips.chip(qkv.device)
    config, scores_config = (meta_backward(qkv.dtype, chip.capability, s) for s in (False, True))
    tiles = _dispatch.cdiv(L, config["BLOCK"])
    saved = (qkv, biases, o, do, lse)
    with torch.cuda.device_of(qkv):
        _plans.launch(
            _window_attention_backward_kernel, (windows * H * 2 * tiles,),
            *saved, dqkv, Y, X, H, scale, WINDOW=window, HEAD_DIM=d, **config,
        )  # fmt: skip
        if dbiases is not None:
            # a few programs per SM, each over many windows
            blocks = H * tiles * tiles
            chunks = min(windows, _dispatch.cdiv(4 * chip.num_sms, blocks))
            ds = qkv.new_empty(chunks, H, L, L, dtype=torch.float32)
            _plans.launch(_window_attention_scores_kernel, (chunks * blocks,),
                *saved, ds, windows, chunks, Y, X, H, scale, WINDOW=window, HEAD_DIM=d,
                **scores_config,
            )  # fmt: skip
            _plans.launch(
                _window_attention_biases_kernel, (H * L,),
                ds.sum(0), dbiases, WINDOW=window, **BIASES_META,
            )  # fmt: skip


def forward_twice_differentiable(qkv: Tensor, biases: Tensor, window: int, scale: float) -> Tensor:
    """The reference in explicit matmuls and fp32, for second derivatives.

    PyTorch's scaled_dot_product_attention does not have them. Arguments and result as those of
    `window_attention`.
    """
    q, k, v = split_windows(qkv.float(), window)
    bias = biases.float()[:, offsets(window, biases.device)]
    p = (scale * q @ k.transpose(-2, -1) + bias).softmax(-1)
    return merge_windows(p @ v, qkv.shape, window).to(qkv.dtype)
