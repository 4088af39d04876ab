"""The table of winners, a JSON file for each GPU; `deit_fast.kernels._tuned` reads it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton

from deit_fast.kernels import _tuned
from deit_fast.kernels._chips import Chip


@dataclass
class TableRow:
    """A row of the table.

    Attributes:
        op: The operation.
        shape: As `_tuned.lookup` is asked for it.
        choice: The winner: its implementation and configuration.
        ms: The winner's time, in milliseconds.
        others: The times of the other candidates; None for one that failed.
    """

    op: str
    shape: dict[str, Any]
    choice: dict[str, Any]
    ms: float
    others: dict[str, float | None]


def read_rows(path: Path, chip: Chip) -> list[dict[str, Any]]:
    """The rows of a table; none where there is no file.

    Raises:
        ValueError: The file is no table, or another chip's; the message names it.
    """
    if not path.exists():
        return []
    try:
        _tuned.read(path, chip)  # each row is checked
        return _tuned.read_rows(path, chip)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it, or pass --out for another") from None


def write(path: Path, rows: Sequence[TableRow], chip: Chip) -> int:
    """Merge rows into a table; the file is replaced at once, never half written.

    Args:
        path: The table, which need not exist.
        rows: They replace those of the same operation and shape.
        chip: Whose table it is.

    Returns:
        How many rows the table has then.

    Raises:
        ValueError: The file is no table, or another chip's; it is left as it is.
    """
    before = read_rows(path, chip)
    new = [asdict(row) for row in rows]
    keys = [(row["op"], row["shape"]) for row in new]
    choices = [row for row in before if (row["op"], row["shape"]) not in keys] + new
    table = {
        "gpu": chip.name, "capability": list(chip.capability), "torch": torch.__version__,
        "triton": triton.__version__, "date": date.today().isoformat(), "choices": choices,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(path)
    return len(choices)
