"""The decorator."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from deit_fast.kernels import _explain, _plan_library
from deit_fast.kernels._plans import has_kernels, recording

from .calls import recorded_call
from .kept import plans_of

F = TypeVar("F", bound=Callable[..., Any])
at_once = False  # a kind of call is recorded when it comes first, not when it comes a second time
_off = False


@contextmanager
def in_python() -> Iterator[None]:
    """Context in which no call runs as a plan, for comparisons; not for several threads at once."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def _loads(args):
    return any(map(has_kernels, args)) and _plan_library.library() is not None


def planned(*, without: Sequence[str] = (), inference: bool = False) -> Callable[[F], F]:
    """Decorator of a method of a module: its calls run as launch plans.

    Such a method takes positional arguments, and returns a tensor or a tuple of tensors and None.

    Args:
        without: Names of children that the method does not touch.
        inference: Whether only calls without gradients become plans.
    """

    def decorate(method: F) -> F:
        name = method.__name__

        @wraps(method)
        def run(self, *args, **kwargs):
            if (
                kwargs
                or _off
                or torch.compiler.is_compiling()
                or (_plan_library.loaded is None and not _loads(args))
                or (inference and torch.is_grad_enabled())
                or _explain.decisions is not None
                or recording() is not None
                or forward_ad._current_level >= 0
            ):
                return method(self, *args, **kwargs)
            one = plans_of(self).get(name)
            if one is None:
                one = plans_of(self)[name] = _plan_library.loaded.Planned(at_once)
            result = one(*args)
            if result is NotImplemented:
                return method(self, *args)
            if result is None:
                return recorded_call(method, self, args, one, without)
            return result

        return run  # type: ignore[return-value]  # of the same signature

    return decorate
