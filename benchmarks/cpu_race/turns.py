"""The driver: one process for each contender, a turn for each in every round."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import figures
from .contenders import BASELINE
from .machine import Load, Watch

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # of fp32 logits: the largest difference over the largest baseline logit
PAUSE = 0.02  # seconds: until a process that was stopped or continued is


class Worker:
    """The process of one contender."""

    def __init__(self, contender: str, timm_name: str, batch: int, threads: int) -> None:
        self.contender = contender
        command = [sys.executable, "-m", "benchmarks.cpu_race.worker", contender, timm_name]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [*command, str(batch), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def answer(self) -> dict:
        """The next line it writes; {"failed": why} where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": f"ended with {self.process.wait()}"}

    def turn(self, seconds: float) -> dict:
        """Let it run, alone, for about that long."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        time.sleep(PAUSE)
        with suppress(BrokenPipeError):  # it has ended, as its answer says
            print(json.dumps({"turn": seconds}), file=self.process.stdin, flush=True)
        done = self.answer()
        self.pause()
        return done

    def pause(self) -> None:
        """Stop it, with the threads that it has."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(PAUSE)

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of a line that nobody read
                    pipe.close()


@dataclass(frozen=True)
class Outcome:
    """What became of one network at one batch size."""

    rows: list[dict]
    rounds: int
    seconds: float  # that the rounds took
    load: Load


@contextmanager
def started(
    contenders: list[str], timm_name: str, batch: int, threads: int
) -> Iterator[tuple[dict[str, Worker], dict[str, dict]]]:
    """Start the workers one after the other, check their logits, and pause them.

    Yields:
        The workers whose logits are right; the answers of all.

    Raises:
        RuntimeError: The baseline does not run.
    """
    workers: dict[str, Worker] = {}
    answers: dict[str, dict] = {}
    try:
        for name in contenders:
            workers[name] = Worker(name, timm_name, batch, threads)
            answers[name] = _checked(workers[name].answer(), answers.get(BASELINE))
            if "error" not in answers[BASELINE]:
                raise RuntimeError(f"{BASELINE}: {answers[BASELINE]}, expected it to run")
            workers[name].pause()
        yield {n: w for n, w in workers.items() if "error" in answers[n]}, answers
    finally:
        for worker in workers.values():
            worker.end()


def _checked(answer: dict, baseline: dict | None) -> dict:
    """The answer with the relative error of its logits, or the reason why it is no contender."""
    if "logits" not in answer:
        return answer
    logits = np.array(answer["logits"])
    right = logits if baseline is None else np.array(baseline["logits"])
    if logits.shape != right.shape:
        return {"failed": f"{logits.size} logits, expected {right.size}"}
    error = float(np.abs(logits - right).max() / np.abs(right).max())
    if not error <= TOLERANCE:  # a NaN is not
        return {"failed": f"relative error {error:.1e}, expected at most {TOLERANCE:.0e}"}
    return answer | {"error": error}


def run(
    contenders: list[str], timm_name: str, batch: int, threads: int, rounds: int, turn: float,
    seconds: float, seed: int = 0,
) -> Outcome:  # fmt: skip
    """Let the contenders run in turn.

    Args:
        contenders: Their names, the baseline first.
        timm_name: The network.
        batch: Images of a call.
        threads: Of each contender.
        rounds: At most.
        turn: Seconds of calls in a turn; a call that takes longer is one turn.
        seconds: No round begins after that long; there are two at least.
        seed: Of the order.

    Raises:
        RuntimeError: The baseline does not run.
    """
    with started(contenders, timm_name, batch, threads) as (workers, answers):
        watch = Watch([w.process.pid for w in workers.values()])
        turns: dict[str, list[dict]] = {name: [] for name in workers}
        order, shuffle, begun = list(workers), random.Random(seed), time.monotonic()
        for i in range(rounds):
            if i >= 2 and time.monotonic() - begun > seconds:
                break
            shuffle.shuffle(order)
            for name in order:
                turns[name].append(workers[name].turn(turn))
        load, took = watch.read(), time.monotonic() - begun
    rows = []
    broken = {n: t["failed"] for n, ts in turns.items() for t in reversed(ts) if "failed" in t}
    if BASELINE in broken:
        raise RuntimeError(f"{BASELINE}: {broken[BASELINE]}, expected it to run")
    for name in contenders:
        if name not in workers:
            ((status, note),) = answers[name].items()
            rows.append(figures.row_without_figures(name, status, note))
        elif name in broken:
            rows.append(figures.row_without_figures(name, "failed", broken[name]))
        else:
            row = (name, answers[name]["error"], turns[name], turns[BASELINE], batch)
            rows.append(figures.measured_row(*row))
    return Outcome(rows, len(turns[BASELINE]), took, load)
