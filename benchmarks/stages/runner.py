"""Runs stages: environment of the commands, time that is left, logs. From the checkout's folder."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .plan import FULL, SMOKE, SMOKE_OPTIONS, Command, Stage

ROOT = Path(__file__).parents[2]
RESULTS = Path("benchmarks") / "results"
SECONDS = 450  # of a stage, after which no row is begun; the last may take two minutes more
HAS_GPU = "import torch; print(int(torch.cuda.is_available()))"
DESCRIBE = """import torch; c = torch.cuda
print(c.get_device_name() if c.is_available() else "no GPU", torch.__version__)
from deit_fast.bench.results import commit
print("commit", commit())"""


@contextmanager
def importable_kernels() -> Iterator[None]:
    """Within it the kernels lie in the package, as an installation has them.

    Nothing is installed: an older setuptools does not know this project's metadata.
    """
    link = ROOT / "deit_fast" / "kernels"
    if link.exists():
        yield
        return
    link.symlink_to(Path("..") / "kernels")
    try:
        yield
    finally:
        link.unlink(missing_ok=True)


def copy_earlier_results(out: Path) -> None:
    """What was measured before goes on in `out`; a file that is there stays."""
    for file in sorted((ROOT / RESULTS).glob("*/*.json")):
        copy = out / file.relative_to(ROOT / RESULTS)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)


class Runner:
    """Runs the commands of stages.

    Args:
        python: The interpreter for the commands.
        out: Folder for results, logs and the tuned table.

    Raises:
        SystemExit: PyTorch cannot be imported; with the interpreter's status.
    """

    def __init__(self, python: str, out: Path):
        self.python, self.out = python, out
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "DEIT_FAST_CACHE": str(out / "cache"),  # "tune" writes its table there, for the others
        }
        self.scope = FULL if self._python(HAS_GPU).strip() == "1" else SMOKE
        print(self._python(DESCRIBE), end="", flush=True)

    def _python(self, code):
        done = subprocess.run(
            [self.python, "-c", code], env=self.environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        return done.stdout

    def run(self, stage: Stage) -> bool:
        """Run one stage; whether all of its commands succeeded. A failure does not stop it."""
        began = time.monotonic()
        print(f"\n== {stage.name}", flush=True)
        good = True
        if stage.without_gpu and not self.scope.gpu:
            print(f"{stage.name}: {stage.without_gpu}", flush=True)
        else:
            for command in stage.commands(self.scope):
                good = self._run(command, SECONDS - (time.monotonic() - began)) and good
        print(f"{stage.name}: {time.monotonic() - began:.0f} s", flush=True)
        return good

    def line(self, command: Command, seconds: float) -> list[str]:
        """The command line, with so many seconds left for a benchmark."""
        if not command.benchmark:
            return [*command.tool, self.python, *command.arguments]
        minutes = f"{max(seconds, 0) / 60:.2f}"
        return [
            self.python, "-m", "pytest", "-q", "--benchmark-only",
            "--benchmark-columns=median,mean,rounds", "--out", str(self.out), "--minutes", minutes,
            *command.arguments, *(() if self.scope.gpu else SMOKE_OPTIONS),
        ]  # fmt: skip

    def _run(self, command, seconds):
        line = self.line(command, seconds)
        environment = self.environment | command.environment
        try:
            if command.log is None:
                return subprocess.run(line, env=environment).returncode == 0
            with (
                open(self.out / command.log, "ab" if command.append else "wb") as log,
                subprocess.Popen(
                    line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                ) as process,
            ):
                for text in process.stdout:
                    log.write(text)
                    sys.stdout.buffer.write(text)
                    sys.stdout.buffer.flush()
            return process.returncode == 0
        except OSError as error:
            print(f"{line[0]}: {error.strerror}", file=sys.stderr, flush=True)
            return False
