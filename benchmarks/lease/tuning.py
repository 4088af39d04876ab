"""Autotuning: which tiles and libraries serve DeiT's GEMMs and attention fastest.

Every listed configuration, cuBLAS with its epilogue and SDPA, each first checked against PyTorch.
The steps that follow use the winners.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

import deit_fast
from benchmarks.table5 import DISTILLED
from deit_fast import tune
from deit_fast.bench import timing
from deit_fast.kernels import _chips, _tuned

from .context import Context
from .warmup import NETWORKS

KIND = "tune"  # of the rows
TABLE, MORE = "tuned.json", "tuned_more.json"
BATCH, SMALL_BATCH = 256, 8
RUNS, MORE_RUNS, WARMUP = 8, 30, 2
CLOSE = 0.95  # of the next one's time: such shapes are timed again, over more calls
LATER = "layer_norm_mlp"  # made of the others: tuned after them


def quick(ctx: Context) -> str:
    """Tune B first, then S, then Ti.

    Within a network the GEMMs, that of the backward pass too, attention, folding. Every shape is
    written, and in the table, at once.
    """
    chip = _chips.chip(ctx.device)
    if ctx.small and not _chips.is_simulated():
        return "nothing to tune on a CPU: PyTorch serves it"
    networks = ["Ti"] if ctx.small else list(NETWORKS)
    chosen = [task for name in networks for task in _tasks(ctx, NETWORKS[name], chip)]
    chosen = [t for t in chosen if t.op != LATER] + [t for t in chosen if t.op == LATER]
    return _autotune(ctx, chosen, ctx.folder / TABLE, chip)


def rest(ctx: Context) -> str:
    """Tune what `quick` had no time for, larger models, and again what was close.

    DeiT-B at 384 pixels and in fp8; shapes whose two best were close. Most valuable first. Into a
    table of its own: rows that were measured with the first table stay comparable with each other.
    """
    chip = _chips.chip(ctx.device)
    if ctx.small and not _chips.is_simulated():
        return ""
    networks = ["Ti"] if ctx.small else list(NETWORKS)
    chosen = [task for name in networks for task in _tasks(ctx, NETWORKS[name], chip)]
    if not ctx.small:
        chosen += _tasks(ctx, DISTILLED["B-384"], chip)
    if chip.capability >= (8, 9):
        chosen += _tasks(ctx, NETWORKS[networks[0]], chip, "fp8")
    close = {
        (row["op"], tuple(row["shape"].items()))
        for row in tune.read_rows(ctx.folder / TABLE, chip)
        if closeness(row) > CLOSE
    }
    chosen = sorted(dict.fromkeys(chosen), key=worth, reverse=True)
    return _autotune(ctx, chosen, ctx.folder / MORE, chip, close, MORE_RUNS)


def closeness(row: dict) -> float:
    """The winner's time over the next one's; 0 without one."""
    others = [ms for ms in row["others"].values() if ms]
    return row["ms"] / min(others) if others else 0.0


def worth(task: tune.Task) -> float:
    """FLOPs of one call: its share of the predicted time, near enough."""
    shape = dict(task.shape)
    if "L" in shape:
        return 4.0 * shape["M"] * shape["N"] * shape["L"] * shape["d"]
    hidden = shape.get("hidden")
    return 2.0 * shape["M"] * (2 * shape["D"] * hidden if hidden else shape["K"] * shape["N"])


def _tasks(ctx, name, chip, format=None):
    with torch.device("meta"), _chips.simulate_device(chip):
        model = deit_fast.create_model(name)
        if format is not None:
            deit_fast.quantize(model, format)
    batch = SMALL_BATCH if ctx.small else BATCH
    return tune.tasks(model, batch, torch.bfloat16, chip, training=format is None)


def _autotune(
    ctx, chosen: Iterable[tune.Task], path: Path, chip, again=frozenset(), runs: int = RUNS
) -> str:  # fmt: skip
    """again: (operation, shape) of those that are tuned although the first table has them."""
    known = [row for name in (TABLE, MORE) for row in tune.read_rows(ctx.folder / name, chip)]
    there = {(row["op"], tuple(row["shape"].items())) for row in known} - again
    there |= {(row["op"], tuple(row["shape"].items())) for row in tune.read_rows(path, chip)}
    todo = [t for t in dict.fromkeys(chosen) if (t.op, t.shape) not in there]
    if not todo:
        return "the table has every shape"

    def clock(call, inputs):
        return median(timing.kernel_ms(call, inputs, runs, WARMUP, ctx.device))

    def tick(task, times):
        if not any(times.values()):
            ctx.write(KIND, op=task.op, shape=dict(task.shape), choice=None, ms=None, others={})

    timing.spin_up(ctx.device)
    tuned, surprises = 0, 0
    for row in tune.autotune(todo, ctx.device, clock, ctx.deadline, tick, known):
        ctx.write(KIND, **asdict(row), closeness=closeness(asdict(row)))
        tune.write(path, [row], chip)
        tuned += 1
        surprises += row.choice.get("implementation") not in ("triton", "fold", "parts")
    return f"{tuned} of {len(todo)} shapes, PyTorch or cuBLAS the fastest in {surprises}"


def load_table(folder: Path) -> None:
    """Make the winners of `folder` what every process uses from here on.

    Those that are forked and those that are started.
    """
    path = folder / TABLE
    if not path.exists():
        return
    gpu = json.loads(path.read_text())["gpu"]
    target = Path(os.environ["DEIT_FAST_CACHE"]) / "tuned" / f"{_tuned.slug(gpu)}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    _tuned.forget()
