"""column_sums against fp64: every place, sizes, strides and dtypes; one launch, the same bits."""

import pytest
import torch
from checking import (
    BF16,
    FP16,
    FP32,
    ROW_DTYPES,
    assert_as_accurate,
    assert_equal,
    seed,
)

from deit_fast.kernels import column_sums
from deit_fast.kernels.column_sums import MAX_MATRICES, META, column_sums_reference

# parts and columns: one of each, blocks that are not full, more than one block of either
SIZES = [(1, 1), (2, 192), (130, 33), (128, 32), (300, 70), (257, 100)]


def filled(dtypes, device, sizes=SIZES):
    """Partial sums beside columns and rows of NaN, and outputs of NaN."""
    seed(0)
    pairs = []
    for (P, N), dtype in zip(sizes, dtypes, strict=False):
        wide = torch.full((P + 1, N + 16), torch.nan, device=device)
        x = wide[:P, :N].copy_(torch.randn(P, N, device=device) + 0.5)
        pairs.append((x, torch.full((N,), torch.nan, dtype=dtype, device=device)))
    return pairs


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, MAX_MATRICES + 1))
def test_no_less_accurate_than_torch(count, dtype, device):
    pairs = filled([dtype] * count, device)
    column_sums.run(pairs)
    for i, (x, y) in enumerate(pairs):
        assert_as_accurate(y, column_sums_reference(x, dtype), x.double().sum(0), f"y[{i}]")


def test_each_in_its_dtype(device):
    """Of one launch, and next to what no matrix writes."""
    pairs = filled([FP32, BF16, FP16, FP32, BF16, FP16], device, SIZES[::-1])
    whole = [torch.full((len(y) + 16,), 7.0, dtype=y.dtype, device=device) for _, y in pairs]
    column_sums.run([(x, w[8:-8]) for (x, _), w in zip(pairs, whole, strict=True)])
    for (x, y), w in zip(pairs, whole, strict=True):
        assert_as_accurate(w[8:-8], column_sums_reference(x, y.dtype), x.double().sum(0))
        assert (w[:8] == 7).all() and (w[-8:] == 7).all()


def test_the_same_bits(device):
    """Whatever else the launch sums, and wherever."""
    (x, y), *_ = filled([FP32], device, [(300, 70)])
    column_sums.run([(x, y)])
    others = filled([FP32] * 5, device)
    again = torch.empty_like(y)
    column_sums.run([*others, (x.clone(), again)])
    assert_equal(again, y)


def test_nan_stays_in_its_column(device):
    ((x, y),) = filled([FP32], device, [(200, 64)])
    x[150, 40] = torch.nan
    column_sums.run([(x, y)])
    assert y[40].isnan() and y.isnan().sum() == 1


def test_nothing_to_sum():
    column_sums.run([])


def test_a_row_of_a_block_is_a_cache_line():
    assert META["BLOCK_N"] * FP32.itemsize == 128
