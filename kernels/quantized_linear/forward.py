"""The quantized GEMM kernel with its two epilogues, and its launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _dispatch, _plans
from ..linear.configs import tma_can_address, without_tma
from ..linear.epilogue import _epilogue, _gelu
from ..linear.forward import _tile, descriptors
from ..quantize import _round, _scales
from . import configs


@triton.jit
def _scaled_matmul(
    x_ptr, xs_ptr, w_ptr, first_row, rows_left, first_col, M, N, K, GROUPS: tl.constexpr,
    INT8: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of xq @ wq^T, in fp32; with several groups, each multiplied by its scale."""
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    cols = first_col + tl.arange(0, BLOCK_N)
    # Rows and columns outside read the first ones and are not stored: no mask in the loop.
    safe_rows = tl.where(rows < rows_left, rows, 0)
    if not TMA:
        safe_cols = tl.where(cols < N, cols, 0)
        x_ptrs = x_ptr + first_row.to(tl.int64) * K + (safe_rows[:, None] * K + ks[None, :])
        w_ptrs = w_ptr + (safe_cols[None, :] * K + ks[:, None])
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM if GROUPS == 1 else tl.float32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            x, w = x_ptr.load([first_row, k]), w_ptr.load([first_col, k]).T
        elif EVEN_K:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k + ks < K)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k + ks < K)[:, None], other=0.0)
        if GROUPS == 1:
            acc = tl.dot(x, w, acc, out_dtype=SUM)
        else:
            group = tl.cast(k // (K // GROUPS), tl.int64)  # GROUPS * M may exceed 2**31
            scale = tl.load(xs_ptr + group * M + first_row + safe_rows)
            acc += tl.dot(x, w, out_dtype=SUM).to(tl.float32) * scale[:, None]
        if not TMA:
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
    return acc.to(tl.float32)


@triton.jit
def _quantized_epilogue(
    acc, first_row, rows_left, first_col, b_ptr, y_ptr, ys_ptr, M, N, ACTIVATION: tl.constexpr,
    OWN_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile of quantized y, with scales of its own or by the given one."""
    INT8: tl.constexpr = y_ptr.dtype.element_ty == tl.int8
    GROUP: tl.constexpr = 64  # GROUP_SIZE
    rows, cols = tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < rows_left, cols < N
    if b_ptr is not None:
        acc += tl.load(b_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        acc = _gelu(acc, False)
    if OWN_SCALE:
        groups = first_col // GROUP + tl.arange(0, BLOCK_N // GROUP)
        h = tl.reshape(acc, (BLOCK_M, BLOCK_N // GROUP, GROUP))
        scales, inverse = _scales(h, INT8)
        ptrs = ys_ptr + groups[None, :].to(tl.int64) * M + (first_row + rows)[:, None]
        tl.store(ptrs, scales, mask=in_rows[:, None] & (groups * GROUP < N)[None, :])
        y = tl.reshape(_round(h, inverse[:, :, None], INT8), (BLOCK_M, BLOCK_N))
    else:
        y = _round(acc, 1.0 / tl.load(ys_ptr), INT8)
    y_ptr += first_row.to(tl.int64) * N
    mask = in_rows[:, None] & in_cols[None, :]
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)


@triton.jit
def _scale_and_store(
    acc, first_row, rows_left, first_col, ws_ptr, vectors, res_ptr, y_ptr, ys_ptr, M, N,
    rows_per_sample, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, OWN_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Apply the weight's scales, then the epilogue of a quantized or of a float result."""
    cols = first_col + tl.arange(0, BLOCK_N)
    acc *= tl.load(ws_ptr + cols, mask=cols < N, other=0.0)[None, :]
    b_ptr, ls_ptr, rs_ptr = vectors
    if ys_ptr is not None:
        _quantized_epilogue(
            acc, first_row, rows_left, first_col, b_ptr, y_ptr, ys_ptr, M, N, ACTIVATION,
            OWN_SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _epilogue(
            acc, first_row, rows_left, first_col, (b_ptr, ls_ptr, rs_ptr, None, None, None),
            res_ptr, y_ptr, None, (None, None, None), M, N, rows_per_sample, ACTIVATION, EXACT,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _quantized_linear_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr,  # in: (M, K), (GROUPS, M) or (1, 1); (N, K), (1, N)
    b_ptr, res_ptr, ls_ptr, rs_ptr,  # in: (N,) (M, N) (N,) (S,), or None
    y_ptr,  # out: (M, N)
    ys_ptr,  # of a quantized y: (N / 64, M), out, or (1, 1), in; else None
    M, N, K, rows_per_sample,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, GROUPS: tl.constexpr, PER_ROW: tl.constexpr,
    OWN_SCALE: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
    INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row, rows_left, first_col = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    acc = _scaled_matmul(
        x_ptr, xs_ptr, w_ptr, first_row, rows_left, first_col, M, N, K, GROUPS, INT8, EVEN_K, TMA,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if GROUPS == 1 and PER_ROW:
        rows = tl.arange(0, BLOCK_M)
        acc *= tl.load(xs_ptr + first_row + rows, mask=rows < rows_left, other=0.0)[:, None]
    elif GROUPS == 1:
        acc *= tl.load(xs_ptr)
    vectors = (b_ptr, ls_ptr, rs_ptr)
    if SPLIT:  # half the columns at a time: the epilogue then fits in the registers of two CTAs
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        _scale_and_store(
            left, first_row, rows_left, first_col, ws_ptr, vectors, res_ptr, y_ptr, ys_ptr, M, N,
            rows_per_sample, ACTIVATION, EXACT, OWN_SCALE, BLOCK_M, HALF,
        )  # fmt: skip
        _scale_and_store(
            right, first_row, rows_left, first_col + HALF, ws_ptr, vectors, res_ptr, y_ptr,
            ys_ptr, M, N, rows_per_sample, ACTIVATION, EXACT, OWN_SCALE, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        _scale_and_store(
            acc, first_row, rows_left, first_col, ws_ptr, vectors, res_ptr, y_ptr, ys_ptr, M, N,
            rows_per_sample, ACTIVATION, EXACT, OWN_SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def run(
    y: Tensor, scales: Tensor | None, x: Tensor, x_scales: Tensor, weight: Tensor,
    weight_scales: Tensor, bias: Tensor | None, residual: Tensor | None,
    layer_scale: Tensor | None, row_scale: Tensor | None, out_scale: Tensor | None,
    activation: str,
) -> None:  # fmt: skip
    """Launch what computes y. Every operand is contiguous.

    Args:
        y: Output, (M, N): float, or quantized.
        scales: Output, per-group scales of a quantized y, (N / 64, M) in fp32; None where
            `out_scale` is given or y is float.
        x: Values, (M, K).
        x_scales: (P, M) or (1, 1) in fp32.
        weight: Values, (N, K).
        weight_scales: (1, N) in fp32.
        bias: (N,).
        residual: (M, N).
        layer_scale: (N,).
        row_scale: (S,), for S samples of M / S rows.
        out_scale: Per-tensor scale of a quantized y, (1, 1) in fp32.
        activation: "none" or "gelu".
    """
    (M, K), N = x.shape, weight.shape[0]
    own_scales = scales is not None
    per_row = x_scales.numel() > 1 or M == 1
    groups = x_scales.shape[0]
    shape = configs.lookup_shape(
        x, x_scales, weight, weight_scales, bias, residual, layer_scale, row_scale, out_scale,
        activation, y.dtype,
    )  # fmt: skip
    config = configs.choose(shape, x.device, groups > 1, own_scales)
    if not tma_can_address(x, weight):
        config = without_tma(config, configs.HOPPER_CONFIGS)
    if groups > 1:
        config = config | {"BLOCK_K": configs.block_k(config, K // groups)}
    tiles = _dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"])
    x_arg, w_arg = descriptors(config, x, weight)
    with torch.cuda.device_of(x):
        _plans.launch(_quantized_linear_kernel, (tiles,),
            x_arg, x_scales, w_arg, weight_scales, bias, residual, layer_scale, row_scale, y,
            scales if own_scales else out_scale, M, N, K,
            1 if row_scale is None else M // row_scale.shape[0],
            ACTIVATION=activation, EXACT=y.dtype == torch.float32, GROUPS=groups, PER_ROW=per_row,
            OWN_SCALE=own_scales, EVEN_K=K % config["BLOCK_K"] == 0,
            INT8=x.dtype == torch.int8, **config,
        )  # fmt: skip
