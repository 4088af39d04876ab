"""How kernels are launched, so that launch plans can hold the launches.

    launch(kernel, grid, ...)    `kernel[grid](...)`
    record(recorder, f, ...)     `f(...)`, of which the recorder writes down what the device does

What a plan is: `deit_fast.layers._plans`. Its steps are made by `_plan_recorder.Recorder`, and run
by the library of `_plan_library`, csrc/.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from . import _chips, _plan_library
from ._plan_recorder import Recorder

_local = threading.local()


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


def has_kernels(tensor: object) -> bool:
    """Whether it is a tensor whose operations are kernels that a plan can launch."""
    if not isinstance(tensor, torch.Tensor):
        return False
    interpreted = _chips.INTERPRET and _plan_library.WANTED == "1"
    return tensor.is_cuda or _chips.is_simulated() or interpreted
