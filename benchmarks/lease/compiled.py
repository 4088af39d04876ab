"""torch.compile's modes: compiled in the background, timed once their caches are filled."""

import os
from pathlib import Path

import torch

from deit_fast.bench.modes import MODES
from deit_fast.bench.step import Step

from . import models
from .context import Context, NotReady

# by value: the default mode of all three first, then what takes minutes
JOBS = tuple(
    (name, mode, models.TRAIN_BATCH if MODES[mode].train else models.BATCH)
    for mode in (
        "compile_bf16", "compile_max_autotune_bf16", "compile_amp_bf16_train",
        "compile_max_autotune_amp_bf16_train",
    )
    for name in models.DEITS
)  # fmt: skip


def parts(small: bool) -> list[str]:
    """The networks in each mode."""
    jobs = [JOBS[len(models.DEITS) - 1]] if small else JOBS
    return [f"{name}, {mode}" for name, mode, _ in jobs]


def _job(part):
    return next(job for job in JOBS if part == f"{job[0]}, {job[1]}")


def _marker(work: Path, part: str) -> Path:
    return work / "ready" / part.replace("/", "-").replace(", ", "--").replace(" ", "-")


def prepare(work: Path, device: torch.device, small: bool) -> None:
    """Fill Inductor's caches, a process for each network, its modes in order."""
    by_network: dict[str, list[str]] = {}
    for part in parts(small):
        by_network.setdefault(_job(part)[0], []).append(part)
    (work / "ready").mkdir(exist_ok=True)
    children = []
    for name, chosen in by_network.items():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _compile(work, device, small, name, chosen)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def _compile(work, device, small, name, chosen):
    network = models.network_of(name, device, small)
    for part in chosen:
        _, mode_name, batch = _job(part)
        mode = MODES[mode_name]
        with mode.settings():
            step = Step(network, mode)
            images = step.cast(network.batch(models.SMALL_BATCH if small else batch))
            step(images)
        del step, images
        torch.compiler.reset()
        _marker(work, part).touch()
        print(f"[compiled] ready: {part}", flush=True)


def step(ctx: Context, part: str) -> str:
    """Time one network in one mode of torch.compile beside the baseline.

    Raises:
        NotReady: Its caches are not filled yet.
    """
    name, mode, batch = _job(part)
    if not _marker(ctx.work, part).exists():
        raise NotReady("not compiled yet")
    baseline = models.TRAIN_BASELINE if MODES[mode].train else models.BASELINE
    try:
        return models.measure(ctx, name, (baseline, mode), batch)
    finally:
        torch.compiler.reset()
