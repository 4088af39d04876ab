"""What `python -m benchmarks.lease` left in a folder, without what is implausible."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from deit_fast.bench import results
from deit_fast.bench.modes import MODES
from deit_fast.bench.results import KernelRow, ModelRow

from . import smoke
from .context import ROWS
from .orchestrate import HEADER, broken

KINDS = {
    "facts", "smoke", "agreement", "peak_rate", "tune", "model", "kernel", "sanitizer", "step",
}  # fmt: skip
HEAD = ("kind", "step", "kernels")  # of every row, beside "run"
# A model's FLOPs are counted whole; ours leaves 7% of them out, the last block's. Clocks differ.
MOST_OF_PEAK_RATE = {"model": 1.12, "kernel": 1.08}
MOST_ERROR = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "bf16": 1e-1, "fp8": 3e-1, "int8": 3e-1}


@dataclass(frozen=True)
class Lease:
    """A folder of results.

    Attributes:
        folder: Where they are.
        header: What lease.json says.
        rows: Those of these kernels, by kind.
        models: The last plausible row of each network, mode, protocol and batch.
        kernels: The last plausible row of each operation, shape and implementation.
        rejected: Of the others, what is wrong.
    """

    folder: Path
    header: dict
    rows: dict[str, list[dict]]
    models: dict[tuple, ModelRow]
    kernels: dict[tuple, KernelRow]
    rejected: list[str]

    @property
    def peak_rates(self) -> dict[str, float]:
        """The last measured ones."""
        return {row["name"]: row["value"] for row in self.rows.get("peak_rate", ())}

    @property
    def failed(self) -> frozenset[str]:
        """Kernel families that failed the smoke test."""
        return smoke.failed_families(self.rows.get("smoke", []), broken(self.rows.get("step", [])))


def read(folder: Path) -> Lease:
    """Read a folder back.

    Raises:
        ValueError: It holds no lease, a damaged one, a rehearsal, or one of other kernels than this
            checkout's; the message names the file and what is wrong.
    """
    header = _header(folder)
    if not header["hardware"]["gpu"]:
        raise ValueError(f"{folder}: a rehearsal without a GPU, expected results of one")
    ours = results.kernel_digest()
    if header["kernels"] != ours:
        raise ValueError(
            f"{folder}: measured with kernels {header['kernels']} of commit {header['commit']}, "
            f"this checkout has {ours}; check that commit out to take them"
        )
    rows: dict[str, list[dict]] = {}
    lease = Lease(folder, header, rows, {}, {}, [])
    for number, row in _lines(folder / ROWS):
        if row is None:
            lease.rejected.append(f"line {number}: cut off")
        elif row["kernels"] == ours:
            rows.setdefault(row["kind"], []).append(row | {"line": number})
    for name in ("bf16_tflops", "copy_tb_per_s"):
        if name not in lease.peak_rates:
            raise ValueError(
                f"{folder / ROWS}: no peak rate {name}: nothing to hold figures against"
            )
    for kind, type_of, into in (
        ("model", ModelRow, lease.models), ("kernel", KernelRow, lease.kernels),
    ):  # fmt: skip
        for values in rows.get(kind, ()):
            row = _typed(folder, values, type_of)
            why = _why_implausible(row, kind, lease)
            if why:
                lease.rejected.append(
                    f"line {values['line']}, {' '.join(map(str, row.key))}: {why}"
                )
                into.pop(row.key, None)  # an earlier row of the key is not what counts
            elif row.status != "failed" or row.key not in into:
                into[row.key] = row
    return lease


def _header(folder):
    path = folder / HEADER
    if not path.is_file():
        raise ValueError(f"{folder}: no {HEADER}, expected a folder of benchmarks.lease")
    try:
        header = json.loads(path.read_text())
        missing = [
            name
            for name in ("version", "hardware", "chip", "slug", "commit", "kernels", "started")
            if name not in header
        ]
        known = not missing and header["version"] == 1 and "gpu" in header["hardware"]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not JSON of a lease ({error})") from None
    if not known:
        raise ValueError(f"{path}: lacks {missing or 'version 1'}")
    return header


def _lines(path):
    """(number, row) of each; None for one that a killed step left cut off."""
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            if not line.startswith("{"):
                raise ValueError(f"{path}: line {number} is not JSON") from None
            yield number, None
            continue
        if not isinstance(row, dict) or row.get("kind") not in KINDS or "kernels" not in row:
            raise ValueError(f"{path}: line {number} is no row of a lease")
        yield number, row


def _typed(folder, values, kind):
    number = values["line"]
    values = {k: v for k, v in values.items() if k not in (*HEAD, "line")}
    names = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"{folder / ROWS}: line {number} has unknown fields {unknown}")
    return results.row_of(folder / ROWS, number, values)


def _why_implausible(row, kind, lease):
    """Why a figure can't be right, or None."""
    if row.status != "measured":
        return None
    times = (row.ms_median, row.ms_mean, row.ms_p20, row.ms_p80)
    if not all(t is not None and math.isfinite(t) and t > 0 for t in times):
        return f"times of {times} ms"
    ours = MODES[row.mode].fast if kind == "model" else row.mode == "fused"
    precision = MODES[row.mode].precision if kind == "model" else row.dtype
    error = row.relative_error
    if error is None or not 0 <= error <= MOST_ERROR.get(precision, 0.3):
        return f"a relative error of {error}"
    if kind == "model":
        per_s = 1e3 * row.batch / row.ms_median
        if row.images_per_s is None or not 0.99 < row.images_per_s / per_s < 1.01:
            return f"{row.images_per_s} images/s, {per_s:.0f} by its time"
        peak_rate = lease.peak_rates.get(f"{precision}_tflops")
        share = row.tflops / peak_rate if peak_rate and row.tflops else 0.0
        if ours and lease.failed and "failed the smoke test" not in (row.note or ""):
            return f"{', '.join(sorted(lease.failed))} failed the smoke test, and no note says so"
    else:
        share = row.fraction_of_peak_rate or 0.0
        failed = {name.removesuffix(smoke.BACKWARD) for name in lease.failed}
        if ours and row.op in failed and row.served_by == "triton":
            return f"{row.op} failed the smoke test"
    if share > MOST_OF_PEAK_RATE[kind]:
        return f"{share:.2f} of the measured peak rate"
    return None
