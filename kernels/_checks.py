"""Arguments: which dtypes the kernels take, what autocast makes of them, and errors that name them."""

from contextlib import nullcontext

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


FORMAT_NAMES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks of matrix products on x's device; None outside it."""
    kind = x.device.type
    if kind == "meta":
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(x: torch.Tensor):
    """A context in which products on x's device keep their dtype."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def cast(dtype: torch.dtype | None, *tensors):
    """The tensors in `dtype`; as they are where it is None. None stays None."""
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


def expect(op: str, x: torch.Tensor, dtype: torch.dtype | None = None, /, **arguments):
    """Raise ValueError or TypeError unless each `name=(tensor, shape)` has that shape, is on x's
    device and (if given) has `dtype`. A tensor of None passes."""
    for name, (t, shape) in arguments.items():
        if t is None:
            continue
        if t.shape != torch.Size(shape):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, expected {x.device}")
        if dtype is not None and t.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected {dtype}")
