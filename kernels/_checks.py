"""Arguments: the dtypes that kernels take, what autocast makes of them, errors that name them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMAT_NAMES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks of GEMMs on x's device; None outside it."""
    kind = x.device.type
    if kind == "meta":
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which GEMMs on x's device keep their operands' dtype."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def cast(dtype: torch.dtype | None, *tensors: torch.Tensor | None) -> list[Any]:
    """The tensors in `dtype`; unchanged where it is None. A tensor of None stays None."""
    # list[Any]: where a tensor came a tensor goes, which a list's type cannot say
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


def expect(
    op: str, x: torch.Tensor, dtype: torch.dtype | None = None, /,
    **arguments: tuple[torch.Tensor | None, Sequence[int]],
) -> None:  # fmt: skip
    """Check shape, device and dtype of an operation's arguments.

    Args:
        op: The operation, for the message.
        x: The tensor whose device the others must share.
        dtype: What the others must have; None: any.
        **arguments: `name=(tensor, expected shape)`. A tensor of None passes.

    Raises:
        ValueError: For another shape or device.
        TypeError: For another dtype.
    """
    for name, (t, shape) in arguments.items():
        if t is None:
            continue
        if t.shape != torch.Size(shape):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, expected {x.device}")
        if dtype is not None and t.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected {dtype}")
