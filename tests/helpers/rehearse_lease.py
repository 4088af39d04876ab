"""All of `python -m benchmarks.lease` on a chip that is not there; prints as JSON what came of it.

    python -m rehearse_lease FOLDER [--faults]       (tests/ on the import path)

Every step runs: kernels are compiled and launched, by small batches, but do not run. So errors and
times are made up, and what torch.compile would do is left out. The warm-up ends before the first
step begins, to see what the steps compile after it. --faults: some steps raise, hang, are killed or
lose the device.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.lease import background, bare, orchestrate

WARMUP_SECONDS = 600
PEAK_RATES = {"bf16_tflops": 800.0, "fp8_tflops": 1600.0, "copy_tb_per_s": 3.0}


def fake_clock(timing, peak_rates) -> None:
    """Every call is made once and takes about a millisecond."""
    ticks = itertools.count()

    def clock(call, inputs, runs, warmup, device):
        call(inputs[0])
        return [1.0 + next(ticks) % 7 / 100 for _ in range(runs)]

    timing.throughput_ms = timing.latency_ms = timing.kernel_ms = clock
    timing.host_ms = lambda call, inputs, runs, device: 0.5
    timing.rotation = lambda make, nbytes, device: [make()]
    timing.spin_up = lambda device, seconds=0.5: None
    peak_rates.peak_rates = lambda device, runs=1: PEAK_RATES


def accept_unwritten_memory() -> None:
    """Memory that no kernel wrote counts as right; a CUDA graph runs as it would without one."""
    import torch

    from benchmarks import kernel_rows
    from benchmarks.lease import agreement, smoke
    from deit_fast.bench import correctness, network, step
    from deit_fast.tune import benchmark

    kernel_rows.agree = lambda got, plain, exact, inputs: 0.0
    smoke.relative_error = lambda got, truth: 0.0
    agreement.relative = lambda error: 0.0
    benchmark._is_correct = lambda got, exact, allowed: True
    correctness.check = lambda network, step, batch: 1e-3
    why_not = network.Network.why_not
    network.Network.why_not = lambda self, mode: why_not(
        self, dataclasses.replace(mode, engine=False, graph=False)
    )
    step._TrainingGraph = Graph
    torch.compiler.set_stance("force_eager")


class Graph:
    def __init__(self, step, images):
        self.step, self.images = step, images

    def replay(self, images):
        return self.step.forward_backward(images)


def break_steps() -> None:
    from benchmarks.lease import agreement, models, peak_rates, plans

    def raises(ctx, part):
        raise ValueError("made to raise")

    def loses_it(ctx, part):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    agreement.step = plans.step = raises
    peak_rates.step = lambda ctx: time.sleep(600)
    models.latency = lambda ctx, part: os.kill(os.getpid(), signal.SIGKILL)
    models.relatives = loses_it


def rehearse(args, work: Path) -> dict:
    bare.prepare(work)
    from stand_in_cuda import install

    from deit_fast.bench import peak_rates, timing

    gpu = install((9, 0), args.library)
    fake_clock(timing, peak_rates)
    accept_unwritten_memory()
    if args.faults:
        break_steps()
    caches, cache = [], Path(os.environ["TRITON_CACHE_DIR"])
    start = background.Background.start

    def files():
        return {p.name for p in cache.rglob("*.*")} if args.warm else set()

    def started(self, name, function):
        if name == "kernels" and not args.warm:
            return
        start(self, name, function)
        if name == "kernels":
            self.wait(name, WARMUP_SECONDS)
            caches.append((self.ended.get(name), files()))

    background.Background.start = started
    made = orchestrate.Run(args, work)
    status = made.steps()
    (warmed, before), *_ = caches or [(None, set())]
    return {
        "status": status, "chip": gpu.chip.name, "warm-up": warmed,
        "compiled": sorted(files() - before), "seconds": round(time.monotonic() - made.began, 1),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rehearse_lease")
    parser.add_argument("out", type=Path)
    parser.add_argument("--library", type=Path, help="folder of the stand-in library")
    parser.add_argument("--faults", action="store_true", help="break some steps")
    parser.add_argument(
        "--warm", action="store_true", help="compile ahead, and see what was missed"
    )
    parser.add_argument("--seconds", type=float, default=5400.0)
    parser.add_argument("--steps", nargs="+")
    args = parser.parse_args(argv)
    args.resume, args.processes = None, None
    work = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    try:
        print(json.dumps(rehearse(args, work)))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
