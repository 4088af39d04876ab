"""Column sums of several matrices of partial sums, in one launch.

    y_i[n] = sum_p x_i[p, n]        for i < MAX_MATRICES

A backward pass leaves such matrices in fp32: the gradients of biases, LayerNorms and LayerScale,
summed over the rows of one program. Here they are summed over the programs, and rounded once, to
the dtype of the parameter. PyTorch would need a sum and a cast for each vector.

P partial sums of N columns: x_i (P_i, N_i) in fp32, rows at any distance; y_i (N_i,). The order of
the additions depends on P_i alone: equal inputs give equal bits. It serves other operations'
backward and has no public function.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dispatch, _plans

MAX_MATRICES = 6  # biases of two linear layers, one of them in two parts; LayerScale; LayerNorm's


def column_sums_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The column sums of one matrix in PyTorch's operations: the definition of right."""
    return x.sum(0).to(dtype)


@triton.jit
def _sum_columns(block, x_ptr, y_ptr, P, N, row, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum the columns of one block of one matrix; nothing where the block is another matrix's."""
    if (block >= 0) & (block < tl.cdiv(N, BLOCK_N)):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        parts = tl.arange(0, BLOCK_P)
        sums = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        for first in range(0, P, BLOCK_P):
            mask = (first + parts < P)[:, None] & (cols < N)[None, :]
            # int64: P * row may exceed 2**31
            offs = (first + parts).to(tl.int64)[:, None] * row + cols[None, :]
            sums += tl.load(x_ptr + offs, mask=mask, other=0.0)
        tl.store(y_ptr + cols, tl.sum(sums, axis=0), mask=cols < N)


# P changes with the batch: no variant of the kernel for a P of 1 or a multiple of 16
@triton.jit(do_not_specialize=["P0", "P1", "P2", "P3", "P4", "P5"])
def _column_sums_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr,  # in: (P, N) in fp32; None from some one on
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr,  # out: (N,)
    P0, P1, P2, P3, P4, P5, N0, N1, N2, N3, N4, N5,
    x0_row, x1_row, x2_row, x3_row, x4_row, x5_row,  # strides
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    _sum_columns(block, x0_ptr, y0_ptr, P0, N0, x0_row, BLOCK_P, BLOCK_N)
    if x1_ptr is not None:
        block -= tl.cdiv(N0, BLOCK_N)
        _sum_columns(block, x1_ptr, y1_ptr, P1, N1, x1_row, BLOCK_P, BLOCK_N)
    if x2_ptr is not None:
        block -= tl.cdiv(N1, BLOCK_N)
        _sum_columns(block, x2_ptr, y2_ptr, P2, N2, x2_row, BLOCK_P, BLOCK_N)
    if x3_ptr is not None:
        block -= tl.cdiv(N2, BLOCK_N)
        _sum_columns(block, x3_ptr, y3_ptr, P3, N3, x3_row, BLOCK_P, BLOCK_N)
    if x4_ptr is not None:
        block -= tl.cdiv(N3, BLOCK_N)
        _sum_columns(block, x4_ptr, y4_ptr, P4, N4, x4_row, BLOCK_P, BLOCK_N)
    if x5_ptr is not None:
        block -= tl.cdiv(N4, BLOCK_N)
        _sum_columns(block, x5_ptr, y5_ptr, P5, N5, x5_row, BLOCK_P, BLOCK_N)


# 32 columns are a cache line of 128 bytes; few columns a program, because DeiT has few. 16 loads
# of a thread are under way at once, so that some 500 partial sums take four rounds.
META = {"BLOCK_P": 128, "BLOCK_N": 32, "num_warps": 8}


def run(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Launch the kernel; nothing where there are no pairs.

    Args:
        pairs: At most `MAX_MATRICES` of x (P, N) in fp32, with consecutive columns, and the output
            y (N,) in any float dtype, contiguous. P and N are 1 or more.
    """
    if not pairs:
        return
    absent = MAX_MATRICES - len(pairs)
    none, zeros = (None,) * absent, (0,) * absent
    xs, ys = zip(*pairs, strict=True)
    sizes, rows = [x.shape for x in xs], [x.stride(0) for x in xs]
    blocks = sum(_dispatch.cdiv(N, META["BLOCK_N"]) for _, N in sizes)
    with torch.cuda.device_of(xs[0]):
        _plans.launch(
            _column_sums_kernel, (blocks,),
            *xs, *none, *ys, *none, *(P for P, _ in sizes), *zeros, *(N for _, N in sizes), *zeros,
            *rows, *zeros, **META,
        )  # fmt: skip
