"""The fused kernel and its launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _plans
from ..linear.epilogue import _epilogue, _gelu
from .configs import FUSED_D, choose


@triton.jit
def _layer_norm_mlp_kernel(
    x_ptr, g_ptr, h_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, res_ptr,  # in; biases, res may be None
    y_ptr, row_stats_out_ptr,  # out: (M, D) and (D / 64, 2, M) or None
    M, eps, HIDDEN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows; BLOCK_H features of the hidden layer at a time.

    Triton's blocks are powers of two: the D columns are two such blocks, D0 + D1.
    """
    D: tl.constexpr = D0 + D1
    first_row = tl.program_id(0) * BLOCK_M
    rows, rows_left = tl.arange(0, BLOCK_M), M - first_row
    in_rows = rows < rows_left
    base = first_row.to(tl.int64) * D
    cols0, cols1, units = tl.arange(0, D0), D0 + tl.arange(0, D1), tl.arange(0, BLOCK_H)
    offs0, offs1 = rows[:, None] * D + cols0[None, :], rows[:, None] * D + cols1[None, :]
    mask = in_rows[:, None]

    x0 = tl.load(x_ptr + base + offs0, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr + base + offs1, mask=mask, other=0.0).to(tl.float32)
    mean = ((tl.sum(x0, axis=1) + tl.sum(x1, axis=1)) / D)[:, None]
    x0, x1 = x0 - mean, x1 - mean
    rstd = tl.rsqrt((tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1)) / D + eps)[:, None]
    x0 = x0 * rstd * tl.load(g_ptr + cols0).to(tl.float32)[None, :]
    x1 = x1 * rstd * tl.load(g_ptr + cols1).to(tl.float32)[None, :]
    x0 = (x0 + tl.load(h_ptr + cols0).to(tl.float32)[None, :]).to(x_ptr.dtype.element_ty)
    x1 = (x1 + tl.load(h_ptr + cols1).to(tl.float32)[None, :]).to(x_ptr.dtype.element_ty)

    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    for first in range(0, HIDDEN, BLOCK_H):
        w1_ptrs = w1_ptr + (first + units)[None, :] * D
        z = tl.dot(x0, tl.load(w1_ptrs + cols0[:, None]))
        z = tl.dot(x1, tl.load(w1_ptrs + cols1[:, None]), z)
        if b1_ptr is not None:
            z += tl.load(b1_ptr + first + units).to(tl.float32)[None, :]
        z = _gelu(z, False).to(x_ptr.dtype.element_ty)
        w2_ptrs = w2_ptr + (first + units)[:, None]
        acc0 = tl.dot(z, tl.load(w2_ptrs + cols0[None, :] * HIDDEN), acc0)
        acc1 = tl.dot(z, tl.load(w2_ptrs + cols1[None, :] * HIDDEN), acc1)
    vectors, training = (b2_ptr, None, None, None, None, None), (None, None, None)
    _epilogue(
        acc0, first_row, rows_left, 0, vectors, res_ptr, y_ptr, row_stats_out_ptr, training,
        M, D, 1, "none", False, BLOCK_M, D0,
    )  # fmt: skip
    _epilogue(
        acc1, first_row, rows_left, D0, vectors, res_ptr, y_ptr, row_stats_out_ptr, training,
        M, D, 1, "none", False, BLOCK_M, D1,
    )  # fmt: skip


def run(
    y: Tensor, row_stats: Tensor | None, x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
    residual: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Launch the fused kernel. Every operand is contiguous and in x's half precision.

    Args:
        y: Output, (M, D).
        row_stats: Output, the row statistics of y, (D / 64, 2, M) in fp32.
        x: (M, D), with D in `FUSED_D`.
        norm_weight: (D,), in any float dtype, as norm_bias.
        norm_bias: (D,).
        fc1_weight: (hidden, D).
        fc1_bias: (hidden,).
        fc2_weight: (D, hidden).
        fc2_bias: (D,).
        residual: (M, D).
        eps: Of LayerNorm.
    """
    (M, D), hidden = x.shape, fc1_weight.shape[0]
    config = choose(x, hidden)
    with torch.cuda.device_of(x):
        _plans.launch(_layer_norm_mlp_kernel, (_dispatch.cdiv(M, config["BLOCK_M"]),),
            x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual,
            y, row_stats, M, eps, HIDDEN=hidden, D0=FUSED_D[D][0], D1=FUSED_D[D][1], **config,
        )  # fmt: skip
