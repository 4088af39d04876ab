"""The folder that a run writes: what is in it, one run at a time, every file whole."""

import contextlib
import csv
import fcntl
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from . import checkpoints

CHECKPOINT, SETTINGS, LOG = "checkpoint.pt", "settings.json", "log.csv"
RUN, RESULT, UNREADABLE = "run.json", "result.json", "unreadable.csv"
MODEL, EMA_MODEL, TENSORBOARD = "model", "model-ema", "tensorboard"
REPORT = "report"  # what deit_fast.finetune.finish writes
PATIENCE = 10  # seconds


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder, and let one run at a time write into it.

    Raises:
        ValueError: Another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as file:
        if not lock(file):
            raise ValueError(f"out: another run writes into {out}")
        yield


def lock(file: IO) -> bool:
    """Lock an open file against other processes, until it is closed.

    Returns:
        False where another process holds it for longer than the workers of a killed run do, which
        have inherited its lock.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        time.sleep(0.1)


@contextlib.contextmanager
def tensorboard(out: Path, epoch: int) -> Iterator[Callable[[dict], None]]:
    """Yield a function that logs a row of log.csv; `epoch` is the first that is to come."""
    # what a killed run logged after its checkpoint is not shown
    with summary_writer()(str(out / TENSORBOARD), purge_step=epoch) as writer:

        def log(row: dict) -> None:
            for name, value in flat(row).items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])
            writer.flush()

        yield log


def summary_writer() -> type:
    """Import TensorBoard's SummaryWriter.

    Raises:
        RuntimeError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            f"tensorboard: is not installed ({error}): pip install 'deit_fast[train]'"
        ) from error
    return SummaryWriter


def empty(out: Path) -> None:
    """Delete what a run wrote, and nothing else."""
    for name in (CHECKPOINT, SETTINGS, LOG, RUN, RESULT, UNREADABLE):
        (out / name).unlink(missing_ok=True)
    for name in (MODEL, EMA_MODEL, TENSORBOARD, REPORT):
        shutil.rmtree(out / name, ignore_errors=True)


def flat(row: dict) -> dict[str, float]:
    """Flatten a row of the log: "top1/class", "ema/top5/joint" and the like become columns."""
    flat = {key: value for key, value in row.items() if not isinstance(value, dict)}
    for prefix, scores in (("", row.get("scores", {})), ("ema/", row.get("ema", {}))):
        for top in ("top1", "top5"):
            for head, percent in scores.get(top, {}).items():
                flat[f"{prefix}{top}/{head}"] = percent
    return flat


def write_csv(path: Path, rows: list[dict], header: bool = True) -> None:
    """Write rows whose keys may differ; a name that is no UTF-8 is escaped."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    if header:
        writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode(errors="backslashreplace")  # names of files may be no UTF-8
    checkpoints.write_atomically(path, lambda file: file.write(content))


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON, whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    checkpoints.write_atomically(path, lambda file: file.write(text.encode()))
