"""What `python -m deit_fast.tune` and `deit-fast tune` do; their options are in options.py."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from deit_fast import _names
from deit_fast.bench import timing
from deit_fast.kernels import _chips, _tuned
from deit_fast.models import create_model
from deit_fast.quantization import quantize

from . import options
from .benchmark import Clock, Times, autotune
from .model_tasks import ordered, tasks
from .table import TableRow, read_rows, write
from .task import Task

DTYPES = {name: getattr(torch, _names.DTYPES[name]) for name in options.DTYPES}
RUNS, WARMUP = 20, 3


def run(args: argparse.Namespace, clock: Clock | None = None) -> int:
    """Tune the models' shapes, and write the table.

    Args:
        args: The options.
        clock: Instead of the device's, for tests; as of `autotune`.

    Returns:
        0; 1 where nothing was measured; 130 after Ctrl-C.

    Raises:
        ValueError: An option or the table is wrong.
        RuntimeError: There is no CUDA device, or it was lost; the table is written before.
    """
    if min(args.batch) < 1:
        raise ValueError(f"--batch: {min(args.batch)}, expected 1 or more")
    if not args.minutes > 0:
        raise ValueError(f"--minutes: {args.minutes}, expected more than 0")
    if not torch.cuda.is_available() and clock is None:
        raise RuntimeError("tuning measures on a CUDA device, and this machine has none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chip = _chips.chip(device)
    if chip.capability < (8, 0):
        print(f"{chip.name}: cuBLAS and PyTorch serve its GEMMs, there is nothing to choose")
        return 0
    path = args.out or _tuned.folder() / f"{_tuned.slug(chip.name)}.json"
    before = read_rows(path, chip)  # before minutes are spent
    wanted = _tasks(args, chip)
    there = [] if args.again else [(row["op"], row["shape"]) for row in before]
    todo = [task for task in wanted if (task.op, dict(task.shape)) not in there]
    if not todo:
        print(f"{path}: has all {len(wanted)} choices already; --again measures them anew")
        return 0
    if clock is None:

        def clock(call: Callable[[dict], object], inputs: list[dict]) -> float:
            return median(timing.kernel_ms(call, inputs, RUNS, WARMUP, device))

    rows: list[TableRow] = []
    unserved: list[str] = []
    stopped = False
    with _progress(len(todo)) as advance:

        def tick(task: Task, times: Times) -> None:
            advance(str(task))
            if not any(times.values()):
                full = task.candidates and not times
                why = "more than the device's memory" if full else "no candidate ran and agreed"
                unserved.append(f"{task}: {why}")

        deadline = time.monotonic() + 60 * args.minutes
        known = [] if args.again else before
        try:
            for row in autotune(todo, device, clock, deadline, tick, known):
                rows.append(row)
        except KeyboardInterrupt:
            stopped = True
        finally:  # a lost device does not lose what was measured
            total = write(path, rows, chip) if rows else 0
    for line in unserved:
        print(line, file=sys.stderr)
    if not rows:
        print("nothing was measured: no table written", file=sys.stderr)
        return 130 if stopped else 1
    _tuned.forget()
    remaining = len(todo) - len(rows)
    more = f", {remaining} left" if remaining else ""
    print(f"{path}: {len(rows)} choices measured, {total} in all{more}")
    return 130 if stopped else 0


def _tasks(args: argparse.Namespace, chip: _chips.Chip) -> list[Task]:
    """The tasks of all models and batches of the options, each once."""
    keywords: dict[str, Any] = {} if args.image_size is None else {"img_size": args.image_size}
    wanted: dict[Task, None] = {}
    for name in args.model:
        for batch in args.batch:
            with torch.device("meta"), _chips.simulate_device(chip):
                model = create_model(name, **keywords)
                if args.format is not None:
                    quantize(model, args.format)
            found = tasks(model, batch, DTYPES[args.dtype], chip, args.training)
            wanted |= dict.fromkeys(found)
    return ordered(wanted)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, and a function that advances it; without rich, a line a task."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield lambda text: print(text, file=sys.stderr)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("tuning", total=total)
        yield lambda text: progress.update(bar, advance=1, description=text)
