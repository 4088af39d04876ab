"""Benchmark the candidates of tasks: each is checked against PyTorch, then timed."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.errors import TritonError

from deit_fast.bench import timing
from deit_fast.bench.failures import device_is_lost
from deit_fast.kernels import Quantized, _chips, _tuned, dequantize
from deit_fast.kernels.quantized_linear import SHORT_SUMS

from .table import TableRow
from .task import Choice, Task, row_stats_of

Clock = Callable[[Callable[[dict], object], list[dict]], float]
Times = dict[Choice, float | None]


def autotune(
    wanted: Iterable[Task], device: torch.device, clock: Clock, deadline: float,
    tick: Callable[[Task, Times], object] = lambda task, times: None, known: Iterable[dict] = (),
) -> Iterator[TableRow]:  # fmt: skip
    """Benchmark the candidates of each task, and give the table's row for it.

    Earlier winners serve the tasks that follow. A task of which no candidate runs and is correct
    has no row.

    Args:
        wanted: Tasks, in their order.
        device: Where they run.
        clock: clock(call, inputs) gives the milliseconds of call(x), for each x of inputs in turn.
        deadline: Of `time.monotonic()`, after which no task is begun.
        tick: tick(task, times) is called after each task.
        known: Rows of a table that serve too.
    """
    known = list(known)
    for task in wanted:
        if time.monotonic() >= deadline:
            return
        times = _benchmark(task, device, clock, known)
        tick(task, times)
        timed = {candidate: ms for candidate, ms in times.items() if ms}
        if not timed:
            continue
        winner = min(timed, key=lambda candidate: timed[candidate])
        row = TableRow(
            task.op, dict(task.shape), dict(winner), timed[winner],
            {_label(c): ms for c, ms in times.items() if c != winner},
        )  # fmt: skip
        known.append(asdict(row))
        yield row


def _benchmark(task: Task, device: torch.device, clock: Clock, known: list[dict]) -> Times:
    """Milliseconds of each candidate, None where it failed or is wrong.

    Empty where the device's memory does not hold the task.
    """
    times: Times = {}
    chip = _chips.chip(device)
    with torch.no_grad(), _tuned.disabled(), _tuned.assumed(known, chip):
        try:
            inputs = task.make(device)
            exact = (task.exact or task.reference)(**{k: _fp32(v) for k, v in inputs.items()})
            allowed = 2 * _error(task.reference(**inputs), exact) + allowance(inputs)
            nbytes = sum(t.nbytes for t in tree_leaves(inputs) if isinstance(t, Tensor))
            others = timing.rotation(lambda: task.make(device), nbytes, device)[1:]
        except torch.OutOfMemoryError:
            return {}
        for candidate in task.candidates:
            times[candidate] = None
            with _tuned.forced(task.op, dict(candidate)):
                try:
                    if _is_correct(task.call(**inputs), exact, allowed):
                        times[candidate] = clock(lambda x: task.call(**x), [inputs, *others])
                except (RuntimeError, TritonError) as error:  # beyond this chip's resources
                    if device_is_lost(error):
                        raise
    return times


def allowance(inputs: dict[str, Any]) -> float:
    """The relative error that a result may have beyond twice its reference's.

    More on a GPU for fp8 operands, of whose sums its instruction keeps fewer bits than fp32 has.
    """
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    short = any(t.is_cuda and t.dtype == torch.float8_e4m3fn for t in tensors)
    return SHORT_SUMS if short else 1e-6


def _is_correct(got: Any, exact: Tensor, allowed: float) -> bool:
    """Whether a result's error is within bounds, and its row statistics, if any, are its own."""
    y, row_stats = got if type(got) is tuple else (got, None)
    if not _error(y, exact) <= allowed:  # NaN too
        return False
    return row_stats is None or _error(row_stats, row_stats_of(y, len(row_stats))) < 1e-4


def _fp32(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floating else value


def _error(got: Tensor | Quantized, exact: Tensor) -> float:
    got = dequantize(got) if isinstance(got, Quantized) else got
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def _label(choice: Choice) -> str:
    return ", ".join(f"{k} {v}" if k != "implementation" else v for k, v in choice)
