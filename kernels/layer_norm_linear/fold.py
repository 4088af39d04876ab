"""The kernels beside the GEMM that LayerNorm is folded into, and the launches of all three."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _plans
from ..layer_norm import meta
from ..linear.forward import run as run_linear


@triton.jit
def _fold_layer_norm_kernel(
    w_ptr, b_ptr, g_ptr, h_ptr,  # in: (N, K) (N,) or None (K,) (K,)
    w_out_ptr, b_out_ptr, s_ptr,  # out: (N, K) (N,) (N + 1,), the last two fp32; s[N] is u
    N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < N, cols < K
    mask = in_rows[:, None] & in_cols[None, :]
    offs = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    shift = tl.sum(w * h[None, :], axis=1)
    if b_ptr is not None:
        shift += tl.load(b_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(g), axis=0)
    u = tl.exp2(tl.floor(tl.log2(tl.where(largest > 0.0, largest, 1.0))))
    folded = (w * (g / u)[None, :]).to(w_out_ptr.dtype.element_ty)
    tl.store(w_out_ptr + offs, folded, mask=mask)
    tl.store(b_out_ptr + rows, shift, mask=in_rows)
    tl.store(s_ptr + rows, tl.sum(folded.to(tl.float32), axis=1), mask=in_rows)
    if tl.program_id(0) == 0:
        tl.store(s_ptr + N, u)


@triton.jit
def _row_stats_kernel(
    x_ptr,  # in: (M, K)
    row_stats_ptr,  # out: (1, 2, M)
    M, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # int64: M * K may exceed 2**31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / K
    diff = tl.where(mask, x - mean[:, None], 0.0)
    tl.store(row_stats_ptr + rows, mean, mask=rows < M)
    tl.store(row_stats_ptr + M + rows, tl.sum(diff * diff, axis=1), mask=rows < M)


def run(
    y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor,
    bias: Tensor | None, row_stats: Tensor | None, eps: float, activation: str,
) -> None:  # fmt: skip
    """Fold LayerNorm into the weight, and launch the GEMM. Every operand is contiguous.

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
    config = meta(K)
    folded = torch.empty_like(weight)
    shift, sums = (x.new_empty(n, dtype=torch.float32) for n in (N, N + 1))
    with torch.cuda.device_of(x):
        if row_stats is None:
            row_stats = x.new_empty(1, 2, M, dtype=torch.float32)
            programs = _dispatch.cdiv(M, config["BLOCK_M"])
            _plans.launch(_row_stats_kernel, (programs,), x, row_stats, M, K, **config)
        _plans.launch(
            _fold_layer_norm_kernel, (_dispatch.cdiv(N, config["BLOCK_M"]),),
            weight, bias, norm_weight, norm_bias, folded, shift, sums, N, K, **config,
        )  # fmt: skip
    run_linear(
        y, x, folded, shift, activation=activation, row_stats=row_stats, column_sums=sums, eps=eps
    )
