"""Launch plans: a function that runs in Python once, and after that as a list of steps in C++.

    @planned()                  a method of a module whose calls become plans
    launch(kernel, grid, ...)   how a Triton kernel is launched, so that a plan can hold it

The second call of a kind runs as written, like the first, and is recorded
(`_plan_recorder.Recorder`): the launches of Triton's kernels, PyTorch's operators below autograd,
and the tensors between them. The next calls of that kind run the steps without Python, the
dispatcher or Triton's launcher (csrc/plan.h): outputs come from PyTorch's allocator, launches go to
the current stream. In training a plan is one node of the autograd graph, and the backward of the
second call is recorded as well (`_plan_calls`).

A kind of call is (csrc/guards.h): the shapes, strides, dtypes, devices and alignment of the tensors
and of the parameters; the other arguments; grad mode, inference mode, autocast and PyTorch's
choice of attention; this package's settings; the classes, attributes, children, parameters and
hooks of the modules. A call that differs in any of them runs in Python. Parameters are read where
they lie at each call, so changes of their values are seen.

Python runs, by name in `why_not(module)`: hooks inside a module, modules of other libraries, tensor
subclasses, operators whose result the host needs. It also runs under torch.compile and torch.jit,
torch.func, TorchDispatchModes, hooks for saved tensors, and for a gradient of a gradient.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad

from . import _chips, _explain, _plan_library
from ._plan_recorder import Recorder

F = TypeVar("F", bound=Callable[..., Any])
_local = threading.local()
at_once = False  # a kind of call is recorded when it comes first, not when it comes a second time
_off = False


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`, which a plan can repeat.

    Args:
        kernel: A function decorated with `triton.jit`.
        grid: The number of programs in one to three dimensions.
        *args: The kernel's first arguments.
        **meta: Its other arguments, and Triton's options.
    """
    recorder = recording()
    if recorder is None:
        kernel[grid](*args, **meta)
    else:
        recorder.launch(kernel, grid, args, meta)


@contextmanager
def in_python() -> Iterator[None]:
    """Context in which no call runs as a plan, for comparisons; not for several threads at once."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def recording() -> Recorder | None:
    """What records this thread's calls, if anything does."""
    return getattr(_local, "recorder", None)


def record(recorder: Recorder, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, recorded."""
    _local.recorder = recorder
    try:
        with recorder:
            return function(*args)
    finally:
        _local.recorder = None


class Plans(dict[str, Any]):
    """The plans of one module, by the name of the method; a copy of the module has none."""

    def __init__(self, owner: int | None = None) -> None:
        super().__init__()
        self.owner = owner
        self.reasons: dict[str, str] = {}  # why calls of a method run in Python
        self.seen: dict[str, Any] = {}  # `_plan_calls.Seen` of a method

    def __copy__(self):
        return Plans()

    def __deepcopy__(self, memo):
        return Plans()

    def __reduce__(self):
        return Plans, ()


def plans_of(module: nn.Module) -> Plans:
    """The plans of a module, which it keeps in its `__dict__`."""
    plans = module.__dict__.get("_plans")
    if plans is None or plans.owner != id(module):
        plans = module.__dict__["_plans"] = Plans(id(module))
    return plans


def why_not(module: nn.Module) -> dict[str, str]:
    """Why calls of methods of a module run in Python, by the name of the method."""
    return dict(plans_of(module).reasons)


def has_kernels(tensor: object) -> bool:
    """Whether it is a tensor whose operations are kernels that a plan can launch."""
    if not isinstance(tensor, torch.Tensor):
        return False
    interpreted = _chips.INTERPRET and _plan_library.WANTED == "1"
    return tensor.is_cuda or _chips.is_simulated() or interpreted


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
                from ._plan_calls import recorded_call

                return recorded_call(method, self, args, one, without)
            return result

        return run  # type: ignore[return-value]  # of the same signature

    return decorate
