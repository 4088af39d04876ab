"""The whole run: facts, then the steps in order, and what one of them tells the next."""

import importlib
import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from . import bare, context, runner
from .background import Background
from .clocks import CLOCKS, sampled
from .plan import SECONDS, STEPS, Step

HEADER, LOG = "lease.json", "log.txt"
FACTS = Step("facts", 30, "the device", "benchmarks.lease.facts:step")
END = 3.0  # seconds before the end of the run at which the last step is killed
TRAINS = ("agreement", "training", "compiled", "compiled-more")
LEAST = 4.0  # seconds that a step must have to be begun
# What a step waits for, at most so many seconds: compiled one by one the kernels to tune would take
# longer, and torch.compile is paused while something is timed
PLANNED = ("plans", "throughput", "quantized", "training", "latency", "relatives")
WAITS = {
    **dict.fromkeys(PLANNED, ("launch plans", 45.0)), "tune": ("kernels", 30.0),
    "compiled": ("torch.compile", 15.0), "compiled-more": ("torch.compile", 45.0),
}  # fmt: skip


class Run:
    """One run of the command.

    Raises:
        ValueError: The folder to resume is not this chip's or these kernels'.
        RuntimeError: Nothing can be measured here. Nothing is written in either case.
    """

    def __init__(self, args, work: Path):
        self.began = time.monotonic()
        self.args, self.work, self.folder = args, work, args.out
        bare.prepare(work)
        from deit_fast.bench import failures, results  # not before the import path is made
        from deit_fast.kernels import _chips

        self.lost = failures.device_is_lost
        self.kernels, self.sources = results.kernel_digest(), results.sources()
        self.run = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.excluded: frozenset[str] = frozenset()
        cores = sorted(os.sched_getaffinity(0))
        spare = len(cores) >= 8  # four for what is timed, the others for what is not
        self.front = set(cores[:4]) if spare else None
        self.back = set(cores[4:]) if spare else None
        self.processes = args.processes or len(self.back or cores)
        self.facts = self._facts()
        chip = self.facts["chip"]
        self.chip = _chips.Chip(chip["name"], tuple(chip["capability"]), chip["num_sms"])
        self._open()

    def _context(self, name, deadline, folder=None):
        import torch

        small = self.facts is None or not self.facts["hardware"]["gpu"]
        device = torch.device("cpu" if self.facts is not None and small else "cuda")
        if self.facts is None and not torch.cuda.is_available():
            device = torch.device("cpu")
        return context.Context(
            device, folder or self.folder, small, deadline, name, self.run, self.kernels,
            getattr(self, "header", {}), self.work, self.excluded,
        )  # fmt: skip

    def _facts(self):
        """The row "facts", measured in a child: this process never touches the GPU."""
        self.facts = None
        scratch = self.work / "facts"
        scratch.mkdir()
        log = scratch / LOG
        outcome = runner.run(
            FACTS, lambda deadline: self._context("facts", deadline, scratch), FACTS.seconds,
            FACTS.seconds, log, self.lost,
        )  # fmt: skip
        found = context.read(scratch / context.ROWS)
        if not found:
            raise RuntimeError("; ".join(outcome.notes) or "the device tells nothing of itself")
        return found[0]

    def _open(self):
        """The folder and its header, with what an earlier run measured."""
        before = None
        if self.args.resume is not None:
            before = self._earlier(self.args.resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        if before is not None and self.folder.resolve() != self.args.resume.resolve():
            for path in sorted(self.args.resume.iterdir()):
                if path.is_file():
                    shutil.copyfile(path, self.folder / path.name)
        this = {
            "run": self.run, "seconds": self.args.seconds, "steps": self.args.steps,
            "commit": os.environ["DEIT_FAST_COMMIT"],
        }  # fmt: skip
        self.header = {
            "version": 1, "hardware": self.facts["hardware"], "chip": self.facts["chip"],
            "slug": self.facts["slug"], "commit": os.environ["DEIT_FAST_COMMIT"],
            "sources": self.sources, "kernels": self.kernels, "started": self.run,
            "runs": [*(before["runs"] if before else []), this], "finished": False,
        }  # fmt: skip
        self._save()
        row = {k: v for k, v in self.facts.items() if k not in ("kind", "step", "run", "kernels")}
        self._context("facts", 0.0).write("facts", **row)

    def _earlier(self, folder):
        """The header of an earlier run, which has to be this chip's and these kernels'."""
        try:
            header = json.loads((folder / HEADER).read_text())
            chip, kernels = header["chip"]["name"], header["kernels"]
            header["runs"][0]["run"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"--resume: {folder / HEADER} is damaged ({error!r})") from None
        if chip != self.facts["chip"]["name"]:
            here = self.facts["chip"]["name"]
            raise ValueError(f"--resume: {folder} holds results of {chip}, this is {here}")
        rows = context.read(folder / context.ROWS)
        if rows and not any(row["kernels"] == self.kernels for row in rows):
            raise ValueError(
                f"--resume: {folder} is of another commit: its kernels are {kernels}, these are "
                f"{self.kernels}; name a new --out alone to measure these"
            )
        return header

    def _save(self):
        part = self.folder / f"{HEADER}.part"
        part.write_text(json.dumps(self.header, indent=1) + "\n")
        part.replace(self.folder / HEADER)

    def left(self) -> float:
        """Seconds until the last step is killed."""
        return self.args.seconds - (time.monotonic() - self.began) - END

    def steps(self) -> int:
        """Run all steps; 1 where one failed."""
        failed = 0
        chosen = [s for s in STEPS if not self.args.steps or s.name in self.args.steps]
        done = {
            row["name"] for row in self._context("", 0.0).rows("step") if row["status"] == "done"
        }
        self._learn_excluded()
        background = Background(self.folder / LOG, self.back)
        try:
            self._start(background, [s.name for s in chosen])
            for step in chosen:
                if step.name in done and not self.args.steps:
                    print(f"{step.name:14} kept: {step.title}", flush=True)
                    self._after(step)
                    continue
                outcome = self._step(step, background)
                failed |= outcome.status == "failed"
                self._after(step, outcome.status == "failed")
        finally:
            background.stop()
            self.header["finished"] = True
            self._save()
        return int(failed)

    def _start(self, background, chosen):
        """Compilation beside the first steps."""
        from deit_fast.kernels import _chips, _plan_library

        here = self._context("", 0.0)
        if here.device.type == "cuda" or _chips.is_simulated():
            warmup = importlib.import_module("benchmarks.lease.warmup")
            background.start(
                "kernels", lambda: warmup.run(chosen, self.chip, here.small, self.processes)
            )
            background.start("launch plans", _plan_library.build)
        if any(name.startswith("compiled") for name in chosen):
            compiled = importlib.import_module("benchmarks.lease.compiled")
            background.start(
                "torch.compile", lambda: compiled.prepare(self.work, here.device, here.small)
            )

    def _step(self, step, background):
        scale = self.args.seconds / SECONDS
        name, seconds = WAITS.get(step.name, ("", 0.0))
        if not background.wait(name, min(seconds * scale, self.left())):
            print(f"{'':14} {name} in the background is not done yet", flush=True)
        left = self.left()
        if left < LEAST * scale:
            outcome = runner.Outcome("not begun", 0.0, notes=["the run's time is over"])
        else:
            budget = min(step.seconds * scale, left)
            limit = min(budget + runner.GRACE, left)
            if step.name != "smoke":
                self._exclude(step)
            self._load_plans(background)
            if step.exclusive:
                background.pause()
            try:
                outcome = runner.run(
                    step, lambda deadline: self._context(step.name, deadline), budget, limit,
                    self.folder / LOG, self.lost, self.front,
                )  # fmt: skip
            finally:
                background.resume()
        row = {"name": step.name, "status": outcome.status, "seconds": round(outcome.seconds, 2)}
        note = "; ".join(outcome.notes)
        row |= {"summary": outcome.summary, "note": note, "broken": outcome.broken}
        self._context(step.name, 0.0).write("step", **row)
        text = "; ".join(filter(None, (outcome.summary, note)))
        print(f"{step.name:14} {outcome.status} in {outcome.seconds:.1f} s: {text}", flush=True)
        return outcome

    def _after(self, step, failed=False):
        """What the steps that follow have to know."""
        if step.name == "smoke":
            self._learn_excluded()
            for family in sorted(self.excluded):
                print(f"{'':14} {family} failed: PyTorch serves it from here on", flush=True)
        if step.name == "plans" and failed:
            self._leave_out_plans('the step "plans" failed')
        if step.name == "tune":
            from . import tuning

            tuning.load_table(self.folder)

    def _load_plans(self, background):
        """Launch plans once their library is built, for the steps that follow."""
        from deit_fast.kernels import _plan_library

        built = background.ended.pop("launch plans", None)
        if built == 0:
            _plan_library.wait()
            self.header["hardware"]["plans"] = _plan_library.status()
            self._save()
        elif built is not None:
            self._leave_out_plans(f"their library could not be built: see {LOG}")

    def _leave_out_plans(self, why):
        from deit_fast.kernels import _plan_library

        _plan_library.leave_out(why)
        self.header["hardware"]["plans"] = _plan_library.status()
        self._save()
        print(f"{'':14} no launch plans: {why}", flush=True)

    def _learn_excluded(self):
        """Families that failed the smoke test, of this run or of the one that it goes on from."""
        from . import smoke

        here = self._context("smoke", 0.0)
        self.excluded = smoke.failed_families(here.rows("smoke"), broken(here.rows("step")))

    def _exclude(self, step):
        """Failed families are PyTorch's in what this step runs."""
        from deit_fast.kernels import _policy

        from . import smoke

        names = smoke.excluded(self.excluded, step.name in TRAINS)
        _policy.exclude(*names)
        os.environ["DEIT_FAST_EXCLUDE"] = ",".join(names)  # of processes that a step starts


def broken(steps: list[dict]) -> list[str]:
    """Parts of the smoke test that broke their process the last time that it ran."""
    last = [row for row in steps if row["name"] == "smoke"][-1:]
    return [part for row in last for part in row.get("broken", ())]


def run(args) -> int:
    """Run the command, whose options are checked; returns its exit status."""
    work = Path(tempfile.mkdtemp(prefix="lease-"))
    try:
        made = Run(args, work)
        with sampled(made.folder / CLOCKS), _terminated():
            status = made.steps()
        seconds = time.monotonic() - made.began
        print(f"{made.folder}: {seconds:.0f} s")
        if made.facts["hardware"]["gpu"]:
            print(f"python -m benchmarks.take {made.folder}   takes it into the results")
        return status
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _terminated():
    """SIGTERM ends the run as Ctrl-C does: children are killed, the header is written."""

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
