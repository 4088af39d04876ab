"""Kernels of backward and their launches.

    dz           = dy * layer_scale * row_scale * gelu'(z)
    db           = sum_rows(dz)
    dlayer_scale = sum_rows(dy * row_scale * a)

Where dy is itself the result of a matmul, dy = du @ V, "gelu_backward" is that matmul's epilogue:
it gives dz, db and a, recomputed. Sums over rows are partial sums, each over the rows of a program,
which `column_sums` finishes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .. import _dispatch, _plans
from . import configs
from .configs import BACKWARD_META
from .epilogue import _gelu_and_slope
from .forward import _tile, expect_32_bit_offsets, launch


@triton.jit
def _linear_backward_kernel(
    dy_ptr, z_ptr, ls_ptr, rs_ptr,  # in: (M, N) (M, N) (N,) (S,), the last three may be None
    dz_ptr, a_ptr,  # out: (M, N), or None
    db_ptr, dls_ptr,  # out: (cdiv(M, ROWS), N) in fp32, or None
    M, N, rows_per_sample, ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dz from dy, and its column sums over ROWS rows at a time."""
    first_row, rows_left, first_col = _tile(tl.program_id(0), M, N, ROWS, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    base = first_row.to(tl.int64) * N
    if ls_ptr is not None:
        ls = tl.load(ls_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dls = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < rows_left)[:, None] & in_cols[None, :]
        offs = rows[:, None] * N + cols[None, :]
        dz = tl.load(dy_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
        if rs_ptr is not None:
            sample = (first_row + rows) // rows_per_sample
            rs = tl.load(rs_ptr + sample, mask=rows < rows_left, other=0.0)
            dz *= rs.to(tl.float32)[:, None]
        if z_ptr is not None:
            a = tl.load(z_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION == "gelu":
                a, slope = _gelu_and_slope(a, EXACT)
            if a_ptr is not None:
                tl.store(a_ptr + base + offs, a, mask=mask)
            if dls_ptr is not None:
                dls += dz * a
        if ls_ptr is not None:
            dz *= ls
        if ACTIVATION == "gelu":
            dz *= slope
        if dz_ptr is not None:
            tl.store(dz_ptr + base + offs, dz, mask=mask)
        db += dz
    sums = (first_row // ROWS).to(tl.int64) * N + cols
    if db_ptr is not None:
        tl.store(db_ptr + sums, tl.sum(db, axis=0), mask=in_cols)
    if dls_ptr is not None:
        tl.store(dls_ptr + sums, tl.sum(dls, axis=0), mask=in_cols)


def run_backward(
    dy: Tensor, z: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    activation: str, dz: Tensor | None, a: Tensor | None, has_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Launch the kernel that computes dz from dy. Every operand is contiguous.

    Args:
        dy: (M, N).
        z: (M, N), where there is a GELU or a layer_scale.
        layer_scale: (N,).
        row_scale: (S,).
        activation: "none" or "gelu".
        dz: Output, (M, N); None where it is dy itself.
        a: Output, (M, N), recomputed from z.
        has_bias: Whether to sum the columns of dz.

    Returns:
        Partial sums of db and of dlayer_scale, (cdiv(M, ROWS), N) in fp32, each None where it is
        not asked for.
    """
    M, N = dy.shape
    parts = _dispatch.cdiv(M, BACKWARD_META["ROWS"])
    db, dls = (
        dy.new_empty(parts, N, dtype=torch.float32) if asked else None
        for asked in (has_bias, layer_scale is not None)
    )
    grid = (parts * _dispatch.cdiv(N, BACKWARD_META["BLOCK_N"]),)
    rows_per_sample = 1 if row_scale is None else M // row_scale.shape[0]
    exact = (dy if dz is None else dz).dtype == torch.float32
    with torch.cuda.device_of(dy):
        _plans.launch(_linear_backward_kernel, grid,
            dy, z, layer_scale, row_scale, dz, a, db, dls, M, N, rows_per_sample, activation,
            exact, **BACKWARD_META,
        )  # fmt: skip
    return db, dls


def linear_gelu_backward(
    dy: Tensor, weight: Tensor, z: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through y = gelu(z) @ W^T, with GELU's in the epilogue of the matmul.

    The operands have one dtype and are contiguous. It belongs to the body of an operator.

    Args:
        dy: (M, N), of one row or more.
        weight: W, (N, K).
        z: (M, K).
        implementation: "auto", "triton" or "cublas".

    Returns:
        dz = dy @ W * gelu'(z) (M, K); gelu(z), recomputed, (M, K); partial sums of dz's columns,
        (P, K) in fp32.

    Raises:
        ValueError: For a weight of 2**31 elements or more.
    """
    dz, a = torch.empty_like(z), torch.empty_like(z)
    # The kernel reads both operands along the summed axis: a copy of the weight is small beside dy.
    weight = weight.t().contiguous()
    expect_32_bit_offsets(weight)
    M, K = z.shape
    chosen, config = configs.choose(dy, K, "gelu_backward", False, implementation)
    with torch.cuda.device_of(dy):
        if chosen == "cublas":
            sums, _ = run_backward(F.linear(dy, weight), z, None, None, "gelu", dz, a, True)
            assert sums is not None
            return dz, a, sums
        if not configs.tma_can_address(dy, weight):
            config = configs.without_tma(config, configs.HOPPER_CONFIGS)
            config = configs.backward_config(config)
        sums = dy.new_empty(_dispatch.cdiv(M, config["BLOCK_M"]), K, dtype=torch.float32)
        launch(
            config, dy, weight, None, None, None, None, None, None, dz, None, z, a, sums, 1,
            "gelu_backward", 0.0,
        )  # fmt: skip
    return dz, a, sums
