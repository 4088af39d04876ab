"""Compilation ahead of the steps: every kernel that they will launch, by as many processes as there
are cores to spare, in the order in which the steps come."""

from pathlib import Path

from deit_fast.kernels import _runtime

from . import warmup

# step -> what has to be compiled for it
PARTS = {
    "smoke": ("smoke",), "agreement": ("B", "S", "Ti", "train"), "race": ("race",),
    "throughput": ("B", "S", "Ti"), "quantized": ("fp8", "int8"), "training": ("train",),
    "latency": ("latency",), "relatives": ("relatives",),
}  # fmt: skip


def parts_of(steps: list[str]) -> list[str]:
    """What the steps launch, each part once, in the order of need."""
    return list(dict.fromkeys(part for step in steps for part in PARTS.get(step, ())))


def run(chip: _runtime.Chip, steps: list[str], small: bool, processes: int, log: Path) -> None:
    """Compile it all; ends when that is done."""
    jobs = warmup.plan(chip, parts_of(steps), small)
    handle = warmup.start(jobs, processes, None)
    handle.wait(float("inf"))
    finished, total, failed = handle.done()
    print(f"[warm-up] {finished} of {total} jobs done, {len(failed)} failed", flush=True)
