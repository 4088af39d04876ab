"""The clock: calls that take turns, in CPU time of this process."""

import gc
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from deit_fast.bench.step import Step
from deit_fast.layers import _plans

IN_PYTHON = 5  # calls with which the first ones of a batch size are compared


@dataclass(frozen=True)
class Contender:
    """What is timed: `call()`. Entering and leaving `within` is not."""

    call: Callable[[], object]
    within: Callable[[], AbstractContextManager] = nullcontext


def compare(
    contenders: dict[str, Contender], rounds: int, block_us: float, gpu, clock=time.process_time_ns
) -> dict[str, list[float]]:
    """Time calls in turn: in blocks of about the same length, in an order that changes every round.

    Args:
        contenders: Name -> call.
        rounds: How often each has its block.
        block_us: Microseconds that a block should last.
        gpu: The stand-in, which counts kernels that are loaded and launched.
        clock: In nanoseconds.

    Returns:
        Microseconds a call, of each round.

    Raises:
        RuntimeError: A kernel was compiled meanwhile.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    repeats = {
        name: max(1, round(block_us / timed(contender, 1, clock)))
        for name, contender in contenders.items()
    }
    names, loads = list(contenders), gpu.loads()
    gc.collect()
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            timed(contenders[name], 1, clock)  # the others' memory and code have left the caches
            times[name].append(timed(contenders[name], repeats[name], clock))
        gpu.forget()
    if gpu.loads() != loads:
        raise RuntimeError(f"{gpu.loads() - loads} kernels were compiled while calls were timed")
    return times


def timed(contender: Contender, repeats: int, clock=time.process_time_ns) -> float:
    """Microseconds a call, without the garbage collector."""
    call = contender.call
    gc.disable()
    try:
        with contender.within():
            start = clock()
            for _ in range(repeats):
                call()
            return max(clock() - start, 1) / 1e3 / repeats
    finally:
        gc.enable()


def first_calls(step: Step, batches: Iterable[Tensor], gpu) -> tuple[list[float], list[float]]:
    """Microseconds that the first two calls of a batch size take more than calls in Python.

    The second is recorded, and becomes a launch plan. Sizes for which a kernel was compiled are
    left out.

    Raises:
        RuntimeError: Every size needed one.
    """
    found = []
    for images in batches:
        loads, contender = gpu.loads(), Contender(lambda images=images: step(images))
        first, second = timed(contender, 1), timed(contender, 1)
        with _plans.in_python():
            usual = median(timed(contender, 1) for _ in range(IN_PYTHON))
        if gpu.loads() == loads:
            found.append((first - usual, second - usual))
    if not found:
        raise RuntimeError("every batch size had kernels of its own, expected one that had none")
    firsts, seconds = zip(*found, strict=True)
    return list(firsts), list(seconds)
