"""Errors that name an argument, and what autocast asks for."""

import pytest
import torch

from deit_fast.kernels import _checks

FP16, FP32 = torch.float16, torch.float32
X = torch.zeros(2, 3)


def test_what_fits_passes():
    _checks.expect("op", X, y=(torch.zeros(3), (3,)), z=(None, (7,)))
    _checks.expect("op", X, FP32, y=(torch.zeros(2, 3), X.shape))


@pytest.mark.parametrize(
    ("argument", "dtype", "error", "message"),
    [
        ((torch.zeros(4), (3,)), None, ValueError, r"op: y has shape \(4,\), expected \(3,\)"),
        (
            (torch.zeros(3, device="meta"), (3,)), None, ValueError,
            "op: y is on meta, expected cpu",
        ),
        (
            (torch.zeros(3).half(), (3,)), FP32, TypeError,
            "op: y has dtype torch.float16, expected torch.float32",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(argument, dtype, error, message):
    with pytest.raises(error, match=message):
        _checks.expect("op", X, dtype, y=argument)


def test_autocast():
    assert _checks.autocast_dtype(X) is None
    with torch.autocast("cpu", FP16):
        assert _checks.autocast_dtype(X) == FP16
        assert _checks.autocast_dtype(X.to("meta")) is None
        with _checks.without_autocast(X):
            assert _checks.autocast_dtype(X) is None
            assert (X @ X.t()).dtype == FP32
        assert _checks.autocast_dtype(X) == FP16
    with _checks.without_autocast(X):
        assert (X @ X.t()).dtype == FP32


def test_cast_leaves_none():
    half, none = _checks.cast(FP16, X, None)
    assert half.dtype == FP16 and none is None
    same, none = _checks.cast(None, X, None)
    assert same is X and none is None
