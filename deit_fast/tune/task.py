"""One operation on one shape, what may serve it, and random inputs for it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Choice = tuple[tuple[str, Any], ...]  # the items of an implementation and its configuration


@dataclass(frozen=True)
class Task:
    """One operation on one shape, and the candidates that may serve it.

    Two tasks are equal where the table has one row for both.

    Attributes:
        op: The operation, as `_tuned.lookup` names it.
        shape: The items of the shape that `_tuned.lookup` is asked for.
        candidates: The choices that are compared.
        make: Makes random keyword arguments of `call` on a device.
        call: Runs the operation; which candidate serves it is forced from outside.
        reference: The same in PyTorch.
        exact: The reference without the rounding of its result, where fp32 inputs do not give
            that; or None.
    """

    op: str
    shape: tuple[tuple[str, Any], ...]
    candidates: tuple[Choice, ...] = field(compare=False)
    make: Callable[[torch.device], dict[str, Any]] = field(compare=False)
    call: Callable[..., Any] = field(compare=False)
    reference: Callable[..., Any] = field(compare=False)
    exact: Callable[..., Any] | None = field(compare=False, default=None)

    def __str__(self) -> str:
        return f"{self.op} {', '.join(f'{k} {v}' for k, v in self.shape)}"


def items(shape: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A shape, or a choice, as something that can be compared and hashed."""
    return tuple(shape.items())


def choices(implementation: str, configs: Iterable[Mapping[str, Any]]) -> tuple[Choice, ...]:
    """One choice for each configuration of an implementation."""
    return tuple(items({"implementation": implementation, **config}) for config in configs)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as the table has it: "bfloat16"."""
    return str(dtype)[6:]


def random_like(like: Tensor | None, device: torch.device, scale: float = 1.0) -> Tensor | None:
    """A random tensor of the shape and dtype of `like`; None for None.

    Args:
        like: May lie on the meta device.
        device: Where the new tensor lies.
        scale: Its standard deviation.
    """
    if like is None:
        return None
    return (scale * torch.randn(like.shape, device=device)).to(like.dtype)


def row_stats_of(x: Tensor, parts: int) -> Tensor:
    """The row statistics that a GEMM's epilogue leaves beside its result.

    Args:
        x: (M, D).
        parts: Into how many groups of columns D is divided.

    Returns:
        fp32 (parts, 2, M): mean and M2 (sum of squared deviations) of each group.
    """
    grouped = x.float().view(len(x), parts, -1)
    mean = grouped.mean(2)
    squares = (grouped - mean[..., None]).square().sum(2)
    return torch.stack([mean.t(), squares.t()], 1).contiguous()
