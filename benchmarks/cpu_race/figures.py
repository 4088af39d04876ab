"""The figures of a race, and their file, benchmarks/results/cpu-<model>/race.json.

    {"machine": {"cpu", "cores", "isa"}, "cells": [
      {"network", "timm_name", "batch", "threads", "rounds", "turn_s", "date", "commit", "build",
       "versions": {...}, "load_average", "other_percent", "steal_percent", "rows": [
        {"contender", "status": "measured", "failed" or "unavailable", "note", "relative_error",
         "ms_median", "ms_p20", "ms_p80", "images_per_s", "cpu_ms", "faults",
         "ratio_median", "ratio_p20", "ratio_p80"}]}]}

A cell is one network at one batch size: all its rows were measured in turn, in one run. Times are
of one call in ms, over rounds; ratios are of the baseline's time in the same round to this one's;
cpu_ms (CPU time of all threads) and faults (page faults) are medians of a call. A figure that a row
does not have is null.
"""

import json
import os
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

FIGURES = (
    "relative_error", "ms_median", "ms_p20", "ms_p80", "images_per_s", "cpu_ms", "faults",
    "ratio_median", "ratio_p20", "ratio_p80",
)  # fmt: skip
CELL = {
    "network": str, "timm_name": str, "batch": int, "threads": int, "rounds": int, "turn_s": float,
    "date": str, "commit": str, "build": str, "versions": dict, "load_average": float,
    "other_percent": float, "steal_percent": float, "rows": list,
}  # fmt: skip
STATUSES = ("measured", "failed", "unavailable")


class CorruptRace(ValueError):
    """A file that cannot be read as a race; it is left as it is."""


def row_without_figures(contender: str, status: str, note: str, error: float | None = None) -> dict:
    """The row of a contender that was not timed, with the reason."""
    row = {"contender": contender, "status": status, "note": note, **dict.fromkeys(FIGURES)}
    return row | {"relative_error": error}


def measured_row(
    contender: str, error: float, turns: list[dict], baseline: list[dict], batch: int
) -> dict:
    """The row of a contender.

    Args:
        contender: Its name.
        error: The relative error of its logits against the baseline's.
        turns: What its worker measured in each round.
        baseline: As `turns`, of the baseline.
        batch: Images of a call.
    """
    times = [median(t["times"]) for t in turns]
    ratios = [median(b["times"]) / own for b, own in zip(baseline, times, strict=True)]
    ms, ratio = np.percentile(times, [20, 50, 80]), np.percentile(ratios, [20, 50, 80])
    return {
        "contender": contender, "status": "measured", "note": None, "relative_error": error,
        "ms_median": float(ms[1]), "ms_p20": float(ms[0]), "ms_p80": float(ms[2]),
        "images_per_s": float(1e3 * batch / ms[1]),
        "cpu_ms": median(t["cpu_ms"] for t in turns), "faults": median(t["faults"] for t in turns),
        "ratio_median": float(ratio[1]), "ratio_p20": float(ratio[0]),
        "ratio_p80": float(ratio[2]),
    }  # fmt: skip


def load(path: Path) -> dict:
    """Read a race.

    Raises:
        CorruptRace: The message names the file and what is wrong with it.
    """
    try:
        race = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptRace(f"{path}: not JSON ({error})") from None
    if not isinstance(race, dict) or set(race) != {"machine", "cells"}:
        raise CorruptRace(f"{path}: expected an object with machine and cells")
    if not isinstance(race["cells"], list):
        raise CorruptRace(f"{path}: cells is {race['cells']!r}, expected a list")
    for i, cell in enumerate(race["cells"]):
        for name, kind in CELL.items():
            value = cell.get(name) if isinstance(cell, dict) else None
            if not isinstance(value, (int, float) if kind is float else kind):
                raise CorruptRace(f"{path}: cells[{i}].{name} is {value!r}, expected {kind}")
        for j, row in enumerate(cell["rows"]):
            if not isinstance(row, dict) or set(row) != {"contender", "status", "note", *FIGURES}:
                raise CorruptRace(f"{path}: cells[{i}].rows[{j}] has other fields than expected")
            if row["status"] not in STATUSES:
                raise CorruptRace(
                    f"{path}: cells[{i}].rows[{j}].status is {row['status']!r}, expected one of "
                    f"{STATUSES}"
                )
            for name in FIGURES if row["status"] == "measured" else ():
                if not isinstance(row[name], (int, float)):
                    raise CorruptRace(
                        f"{path}: cells[{i}].rows[{j}].{name} is {row[name]!r}, expected a number"
                    )
    return race


def put(path: Path, machine: dict, cell: dict) -> None:
    """Put a cell in the place of the one of the same network and batch; never half a file.

    Raises:
        ValueError: The file holds the figures of another machine.
        CorruptRace: The file cannot be read.
    """
    race = load(path) if path.exists() else {"machine": machine, "cells": []}
    if race["machine"] != machine:
        raise ValueError(f"{path}: holds figures of {race['machine']}, this is {machine}")
    key = (cell["timm_name"], cell["batch"])
    cells = [c for c in race["cells"] if (c["timm_name"], c["batch"]) != key]
    race["cells"] = [*cells, cell]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(race, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
