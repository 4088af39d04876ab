"""The GEMM kernel with its epilogue, the epilogue after cuBLAS, and their launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _chips, _dispatch, _plans
from . import configs
from .epilogue import _epilogue, _row_mean_and_rstd


@triton.jit
def _tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row of a tile, rows left from there on, and its first column.

    Neighbouring tiles share a block of rows, so x is read from device memory once; all of W fits in
    L2.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_row = tile // tiles_n * BLOCK_M
    return first_row, M - first_row, tile % tiles_n * BLOCK_N


@triton.jit
def _matmul(
    x_ptr, w_ptr, first_row, rows_left, first_col, N, K, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of x @ W^T, in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:  # x_ptr and w_ptr are tensor descriptors, which give zeros outside
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_ptr.load([first_row, k]), w_ptr.load([first_col, k]).T, acc)
    else:
        rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        cols = first_col + tl.arange(0, BLOCK_N)
        # Rows and columns outside read the first ones and are not stored: no mask in the loop.
        safe_rows = tl.where(rows < rows_left, rows, 0)
        safe_cols = tl.where(cols < N, cols, 0)
        x_ptrs = x_ptr + first_row.to(tl.int64) * K + (safe_rows[:, None] * K + ks[None, :])
        w_ptrs = w_ptr + (safe_cols[None, :] * K + ks[:, None])
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                x, w = tl.load(x_ptrs), tl.load(w_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(k + ks < K)[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=(k + ks < K)[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
    return acc


@triton.jit
def _linear_tile(
    tile, x_ptr, w_ptr, vectors, res_ptr, row_stats_ptr, y_ptr, row_stats_out_ptr, training, M, N,
    K, rows_per_sample, eps, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row, rows_left, first_col = _tile(tile, M, N, BLOCK_M, BLOCK_N)
    b_ptr, ls_ptr, rs_ptr, sums_ptr = vectors
    mean, rstd = None, None
    if row_stats_ptr is not None:  # before the matmul: two numbers a row, no loads after it
        mean, rstd = _row_mean_and_rstd(
            row_stats_ptr, first_row, rows_left, M, K, eps, PARTS, BLOCK_M
        )
        rstd *= tl.load(sums_ptr + N)  # the unit in which W' is written
    vectors = (b_ptr, ls_ptr, rs_ptr, sums_ptr, mean, rstd)
    acc = _matmul(
        x_ptr, w_ptr, first_row, rows_left, first_col, N, K, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if SPLIT:  # half the columns at a time: the epilogue then fits in the registers of two CTAs
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        _epilogue(
            left, first_row, rows_left, first_col, vectors, res_ptr, y_ptr, row_stats_out_ptr,
            training, M, N, rows_per_sample, ACTIVATION, EXACT, BLOCK_M, HALF,
        )  # fmt: skip
        _epilogue(
            right, first_row, rows_left, first_col + HALF, vectors, res_ptr, y_ptr,
            row_stats_out_ptr, training, M, N, rows_per_sample, ACTIVATION, EXACT, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        _epilogue(
            acc, first_row, rows_left, first_col, vectors, res_ptr, y_ptr, row_stats_out_ptr,
            training, M, N, rows_per_sample, ACTIVATION, EXACT, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, b_ptr, res_ptr, ls_ptr, rs_ptr,  # in; the last four may be None
    row_stats_ptr, sums_ptr,  # in: (PARTS, 2, M) and (N + 1,), fp32, or None
    y_ptr, row_stats_out_ptr,  # out: (M, N) and (N / 64, 2, M) or None
    z_ptr,  # (M, N) or None; out, but in for "gelu_backward"
    a_ptr, col_sums_ptr,  # out: (M, N) and (cdiv(M, BLOCK_M), N) in fp32, or None
    M, N, K, rows_per_sample, eps,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    vectors = (b_ptr, ls_ptr, rs_ptr, sums_ptr)
    training = (z_ptr, a_ptr, col_sums_ptr)
    if PERSISTENT:  # one program an SM: loads for a tile overlap the epilogue of the last one
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _linear_tile(
                tile, x_ptr, w_ptr, vectors, res_ptr, row_stats_ptr, y_ptr, row_stats_out_ptr,
                training, M, N, K, rows_per_sample, eps, ACTIVATION, EXACT, PARTS, EVEN_K, TMA,
                SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _linear_tile(
            tl.program_id(0), x_ptr, w_ptr, vectors, res_ptr, row_stats_ptr, y_ptr,
            row_stats_out_ptr, training, M, N, K, rows_per_sample, eps, ACTIVATION, EXACT, PARTS,
            EVEN_K, TMA, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _linear_epilogue_kernel(
    xw_ptr, b_ptr, res_ptr, ls_ptr, rs_ptr,  # in: x @ W^T, (M, N); the last four may be None
    y_ptr, row_stats_out_ptr, z_ptr,  # out: (M, N), (N / 64, 2, M), (M, N); the last two or None
    M, N, rows_per_sample,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same epilogue as a kernel of its own, for a matmul by cuBLAS."""
    first_row, rows_left, first_col = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows, cols = tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    mask = (rows < rows_left)[:, None] & (cols < N)[None, :]
    offs = rows[:, None] * N + cols[None, :]
    xw_ptr += first_row.to(tl.int64) * N
    acc = tl.load(xw_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    vectors = (b_ptr, ls_ptr, rs_ptr, None, None, None)
    _epilogue(
        acc, first_row, rows_left, first_col, vectors, res_ptr, y_ptr, row_stats_out_ptr,
        (z_ptr, None, None), M, N, rows_per_sample, ACTIVATION, EXACT, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def run(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None, row_stats: Tensor | None = None,
    column_sums: Tensor | None = None, row_stats_out: Tensor | None = None,
    z: Tensor | None = None, activation: str = "none", eps: float = 0.0,
    implementation: str = "triton",
) -> None:  # fmt: skip
    """Launch what computes y. Every operand is contiguous.

    Args:
        y: Output, (M, N).
        x: (M, K).
        weight: (N, K).
        bias: (N,).
        residual: (M, N).
        layer_scale: (N,).
        row_scale: (S,), for S samples of M / S rows.
        row_stats: Of x, (P, 2, M) in fp32, with a LayerNorm folded into `weight`.
        column_sums: Of that LayerNorm, (N + 1,) in fp32.
        row_stats_out: Output, the row statistics of y, (N / 64, 2, M) in fp32.
        z: Output, x @ W^T + b, (M, N).
        activation: "none", "gelu", or "gelu_last" for GELU after the residual.
        eps: Of the folded LayerNorm.
        implementation: "triton", "cublas", or "auto" for a tuned table or the rule to choose.

    Raises:
        ValueError: For a weight of 2**31 elements or more.
    """
    expect_32_bit_offsets(weight)
    M, N = x.shape[0], weight.shape[0]
    rows_per_sample = 1 if row_scale is None else M // row_scale.shape[0]
    extras = (bias, residual, layer_scale, row_scale)
    scaled = layer_scale is not None or row_scale is not None
    emit, exact = row_stats_out is not None, x.dtype == torch.float32
    epilogue = configs.epilogue_name(
        activation, bias is not None, residual is not None, scaled, row_stats is not None, emit
    )
    chosen, config = configs.choose(x, N, epilogue, emit, implementation)
    with torch.cuda.device_of(x):
        if chosen == "cublas" and epilogue in ("", "bias") and z is None:
            if bias is None:
                torch.mm(x, weight.t(), out=y)
            else:
                torch.addmm(bias.to(x.dtype), x, weight.t(), out=y)
        elif chosen == "cublas":
            xw, config = F.linear(x, weight), configs.EPILOGUE_META
            grid = (_dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"]),)
            _plans.launch(_linear_epilogue_kernel, grid,
                xw, *extras, y, row_stats_out, z, M, N, rows_per_sample, activation, exact,
                **config,
            )  # fmt: skip
        else:
            if not configs.tma_can_address(x, weight):
                config = configs.without_tma(config, configs.HOPPER_CONFIGS)
            launch(
                config, x, weight, *extras, row_stats, column_sums, y, row_stats_out, z, None,
                None, rows_per_sample, activation, eps,
            )  # fmt: skip


def expect_32_bit_offsets(weight: Tensor) -> None:
    """Raise ValueError for a weight (N, K) in which the kernels' 32-bit offsets would overflow."""
    N, K = weight.shape
    if N * K >= 2**31:
        raise ValueError(f"linear: weight has {N} x {K} elements, expected fewer than 2**31")


def descriptors(
    config: configs.Config, x: Tensor, weight: Tensor
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
    """The operands as a kernel with this configuration takes them."""
    if not config["TMA"]:
        return x, weight
    return (
        TensorDescriptor.from_tensor(x, [config["BLOCK_M"], config["BLOCK_K"]]),
        TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]]),
    )


def launch(
    config: configs.Config, x: Tensor, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    row_stats: Tensor | None, column_sums: Tensor | None, y: Tensor, row_stats_out: Tensor | None,
    z: Tensor | None, a: Tensor | None, col_sums: Tensor | None, rows_per_sample: int,
    activation: str, eps: float,
) -> None:  # fmt: skip
    """Launch the GEMM kernel in one configuration; the arguments are the kernel's."""
    (M, K), N = x.shape, weight.shape[0]
    tiles = _dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"])
    if config["PERSISTENT"]:
        tiles = min(tiles, _chips.chip(x.device).num_sms)
    _plans.launch(_linear_kernel, (tiles,),
        *descriptors(config, x, weight), bias, residual, layer_scale, row_scale, row_stats,
        column_sums, y, row_stats_out, z, a, col_sums, M, N, K, rows_per_sample, eps,
        ACTIVATION=activation, EXACT=x.dtype == torch.float32,
        PARTS=1 if row_stats is None else row_stats.shape[0],
        EVEN_K=K % config["BLOCK_K"] == 0, **config,
    )  # fmt: skip
