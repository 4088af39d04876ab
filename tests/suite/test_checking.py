"""What the rules of checking.py let pass, and what they do not."""

import pytest
import torch
from checking import (
    BF16,
    FEW,
    FP32,
    assert_as_accurate,
    assert_close,
    assert_gradients_as_accurate,
)

EPS = torch.finfo(FP32).eps


@pytest.fixture(autouse=True)
def no_margins(monkeypatch):
    """Errors are meant here."""
    monkeypatch.delenv("DEIT_FAST_TEST_MARGINS", raising=False)


def judged(judge, *args, **rest):
    """Whether it passes."""
    try:
        judge(*args, **rest)
    except AssertionError:
        return False
    return True


def numbers(count=100, size=1.0):
    torch.manual_seed(0)
    return size * torch.nn.functional.normalize(torch.randn(count).double(), dim=0)


def with_error(true, error):
    """Off by so much of its size, across its direction."""
    return true + error * true.norm() * numbers(true.numel()).flip(0)


@pytest.mark.parametrize("ratio, passes", [(1.9, True), (2.1, False)])
def test_twice_the_error_of_pytorch(ratio, passes):
    true = numbers()
    got, torchs = with_error(true, ratio * 1e-3), with_error(true, 1e-3)
    assert judged(assert_as_accurate, got, torchs, true) == passes
    got[3] = torch.nan
    assert not judged(assert_as_accurate, got, torchs, true)


@pytest.mark.parametrize("left", [0.0, 1e-16])
def test_a_truth_of_zero_is_judged_beside_one(left):
    """Be it exact or what fp64 leaves of it."""
    zero = torch.full((100,), left, dtype=torch.float64)
    for error, passes in ((3 * EPS, True), (5 * EPS, False)):
        assert judged(assert_as_accurate, zero + error, zero, zero) == passes


def test_what_cancels_is_judged_beside_its_terms():
    """A key's bias: its gradient is zero but for rounding, its weight's is not."""
    weight, zero = numbers(), numbers(size=1e-9)
    for error, passes in ((1e-5, False), (1e-6, True)):
        got = {"k.bias": zero.float() + error * numbers().float(), "k.weight": weight.float()}
        true = {"k.bias": zero, "k.weight": weight}
        torchs = {name: t.float() for name, t in true.items()}
        assert judged(assert_gradients_as_accurate, got, torchs, true) == passes
        got["weight"] = got.pop("k.weight")  # now nothing says how large the terms are
        true["weight"], torchs["weight"] = true.pop("k.weight"), torchs.pop("k.weight")
        assert not judged(assert_gradients_as_accurate, got, torchs, true)


def test_few_numbers_are_judged_beside_what_is_typical():
    """... of PyTorch's error: its own in them may be nothing by chance."""
    for count, passes in ((FEW, True), (FEW + 1, False)):
        true = {name: numbers(count if name == "few" else 100) for name in ("few", "a", "b")}
        torchs = {name: t if name == "few" else with_error(t, 1e-3) for name, t in true.items()}
        got = {name: with_error(t, 1.5e-3) for name, t in true.items()}
        assert judged(assert_gradients_as_accurate, got, torchs, true) == passes


def test_two_ways_are_apart_by_roundings_of_their_dtype():
    true = numbers().to(BF16)
    assert judged(assert_close, with_error(true.float(), 1e-2).to(BF16), true)
    assert not judged(assert_close, with_error(true.float(), 3e-2).to(BF16), true)
    assert not judged(assert_close, true.float(), true)  # another dtype
    many = numbers(100_000).to(BF16)
    spike = many.clone()
    spike[0] += 0.008  # half of what the whole may be apart, in one number
    assert not judged(assert_close, spike, many)
