"""The GEMM kernel that normalises its rows as it loads them, and its launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _dispatch, _plans
from ..linear.configs import tma_can_address
from ..linear.epilogue import _epilogue, _row_mean_and_rstd
from ..linear.forward import _tile
from . import configs


@triton.jit
def _mean_and_rstd(
    x_ptrs, ks, K, eps, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of BLOCK_M rows, in one pass over them.

    Sums are of the differences from the mean of the first BLOCK_K columns. By Cauchy-Schwarz its
    square is at most K / BLOCK_K variances, so nothing large cancels, wherever the mean lies.
    """
    x = tl.load(x_ptrs, mask=(ks < K)[None, :], other=0.0).to(tl.float32)
    shift = tl.sum(x, axis=1) / tl.minimum(K, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=4):
        if EVEN_K:
            diff = tl.load(x_ptrs + k).to(tl.float32) - shift[:, None]
        else:
            inside = (k + ks < K)[None, :]
            x = tl.load(x_ptrs + k, mask=inside, other=0.0).to(tl.float32)
            diff = tl.where(inside, x - shift[:, None], 0.0)
        sums += diff
        squares += diff * diff
    diff = tl.sum(sums, axis=1) / K
    var = tl.maximum(tl.sum(squares, axis=1) / K - diff * diff, 0.0)
    return shift + diff, tl.rsqrt(var + eps)


@triton.jit
def _load(x_ptrs, g_ptr, h_ptr, k, ks, K, EVEN_K: tl.constexpr):
    """BLOCK_K columns of the rows from column k on, and of LayerNorm's weight and bias."""
    if EVEN_K:
        return tl.load(x_ptrs + k), tl.load(g_ptr + k + ks), tl.load(h_ptr + k + ks)
    else:
        inside = k + ks < K
        x = tl.load(x_ptrs + k, mask=inside[None, :], other=0.0)
        g = tl.load(g_ptr + k + ks, mask=inside, other=0.0)
        return x, g, tl.load(h_ptr + k + ks, mask=inside, other=0.0)


@triton.jit
def _normalise(x, mean, rstd, g, h, DTYPE: tl.constexpr):
    x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    return (x * g.to(tl.float32)[None, :] + h.to(tl.float32)[None, :]).to(DTYPE)


@triton.jit
def _layer_norm_linear_kernel(
    x_ptr, g_ptr, h_ptr, w_ptr, b_ptr,  # in: (M, K) (K,) (K,) (N, K) (N,) or None
    row_stats_ptr,  # in: (PARTS, 2, M) in fp32, or None
    y_ptr,  # out: (M, N)
    M, N, K, eps,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of act(LN(x) @ W^T + b)."""
    first_row, rows_left, first_col = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    # Rows and columns outside read the first ones and are not stored: no mask in the loop.
    safe_rows = tl.where(rows < rows_left, rows, 0)
    x_ptrs = x_ptr + first_row.to(tl.int64) * K + (safe_rows[:, None] * K + ks[None, :])
    if row_stats_ptr is not None:
        mean, rstd = _row_mean_and_rstd(
            row_stats_ptr, first_row, rows_left, M, K, eps, PARTS, BLOCK_M
        )
    else:
        mean, rstd = _mean_and_rstd(x_ptrs, ks, K, eps, EVEN_K, BLOCK_M, BLOCK_K)
    if not TMA:
        cols = first_col + tl.arange(0, BLOCK_N)
        safe_cols = tl.where(cols < N, cols, 0)
        w_ptrs = w_ptr + (safe_cols[None, :] * K + ks[:, None])
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    x, g, h = _load(x_ptrs, g_ptr, h_ptr, 0, ks, K, EVEN_K)
    # Normalised one step ahead. A loop-carried operand of a dot goes to shared memory, where one
    # that is computed in the same step goes through registers, and ptxas serialises the dots.
    x = _normalise(x, mean, rstd, g, h, DTYPE)
    for k in range(0, K, BLOCK_K):
        ahead = tl.where(k + BLOCK_K < K, k + BLOCK_K, 0)  # after the last step: not used
        next_x, g, h = _load(x_ptrs, g_ptr, h_ptr, ahead, ks, K, EVEN_K)
        if TMA:
            w = w_ptr.load([first_col, k]).T
        elif EVEN_K:
            w = tl.load(w_ptrs + k)
        else:
            w = tl.load(w_ptrs + k, mask=(k + ks < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
        x = _normalise(next_x, mean, rstd, g, h, DTYPE)
    vectors, training = (b_ptr, None, None, None, None, None), (None, None, None)
    if SPLIT:  # as in `linear`
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        _epilogue(
            left, first_row, rows_left, first_col, vectors, None, y_ptr, None, training, M, N, 1,
            ACTIVATION, False, BLOCK_M, HALF,
        )  # fmt: skip
        _epilogue(
            right, first_row, rows_left, first_col + HALF, vectors, None, y_ptr, None, training,
            M, N, 1, ACTIVATION, False, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        _epilogue(
            acc, first_row, rows_left, first_col, vectors, None, y_ptr, None, training, M, N, 1,
            ACTIVATION, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def run(
    y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor,
    bias: Tensor | None, row_stats: Tensor | None, eps: float, activation: str,
) -> None:  # fmt: skip
    """Launch the kernel. Every operand is contiguous.

    Args:
        y: Output, (M, N).
        x: (M, K).
        norm_weight: (K,), in any float dtype, as norm_bias.
        norm_bias: (K,).
        weight: (N, K).
        bias: (N,).
        row_stats: Of x, (P, 2, M) in fp32; None to compute them.
        eps: Of LayerNorm.
        activation: "none" or "gelu".
    """
    (M, K), N = x.shape, weight.shape[0]
    config = configs.choose(x, N)
    if config["TMA"] and not tma_can_address(weight, weight):
        config = config | {"TMA": False}
    tiles = _dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"])
    w = weight
    if config["TMA"]:
        w = TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
    with torch.cuda.device_of(x):
        _plans.launch(
            _layer_norm_linear_kernel, (tiles,), x, norm_weight, norm_bias, w, bias, row_stats, y,
            M, N, K, eps, ACTIVATION=activation,
            PARTS=1 if row_stats is None else row_stats.shape[0],
            EVEN_K=K % config["BLOCK_K"] == 0, **config,
        )  # fmt: skip
