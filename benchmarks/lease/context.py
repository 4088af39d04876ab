"""What a step of the lease gets, and how it writes: every row at once, appended and flushed."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROWS = "rows.jsonl"


class NotReady(Exception):
    """A part of a step that cannot be measured yet: no failure, a later step or run has it."""


@dataclass
class Context:
    """One step's view of the run.

    Attributes:
        device: Where it measures; a CPU in a rehearsal.
        folder: The output folder, flat.
        small: Whether shapes are reduced and runs few, for rehearsals without a GPU.
        deadline: Of `time.monotonic()`, after which the step begins nothing new.
        step: Its name.
        run: Identifies this run among those of a resumed folder.
        kernels: Digest of the kernels' sources: rows of other kernels do not count as measured.
        header: What lease.json says (hardware, chip, commit).
        work: A folder for caches, gone with the run.
        excluded: Kernel families whose smoke test failed; PyTorch serves them.
    """

    device: torch.device
    folder: Path
    small: bool
    deadline: float
    step: str
    run: str
    kernels: str
    header: dict
    work: Path
    excluded: frozenset[str] = frozenset()

    def left(self) -> float:
        """Seconds until the step begins nothing new."""
        return self.deadline - time.monotonic()

    def write(self, kind: str, **row) -> None:
        """Append one row to rows.jsonl: kind, step, run, kernels, and what is given.

        It is on disk when this returns.
        """
        head = {"kind": kind, "step": self.step, "run": self.run, "kernels": self.kernels}
        append(self.folder / ROWS, head | row)

    def rows(self, kind: str) -> list[dict]:
        """The rows of one kind that the folder holds so far and these kernels measured.

        In this run or in an earlier one.
        """
        found = read(self.folder / ROWS)
        return [row for row in found if row["kind"] == kind and row["kernels"] == self.kernels]

    def say(self, line: str) -> None:
        """A line of progress, into the log."""
        print(f"[{self.step}] {line}", flush=True)


def append(path: Path, row: dict) -> None:
    """Append one row; it is on disk when this returns."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # a killed step left half a line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """Every whole row; a last line that a killed step left unfinished is dropped."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "kind" in row and "kernels" in row:
            found.append(row)
    return found
