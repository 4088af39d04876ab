"""The results file: one chip, one benchmark, every figure with the build that produced it.

    {"hardware": {...}, "commit": "<sha>", "build": "<digest>", "date": "2026-11-21",
     "protocol": {...}, "peak_rates": {"bf16_tflops": 788.0, "copy_tb_per_s": 4.3}, "rows": [...]}

A row is a `ModelRow` or a `KernelRow`. Its `build` is a digest of what decides a figure: the
sources of kernels and layers, the tuned choices, the versions of torch, triton, timm and torchao,
and the GPU. Rows are comparable where it is the same. The
file's own `hardware`, `commit`, `build` and `date` are those of the last run that wrote it. The
JSON schema is benchmarks/results.schema.json.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import deit_fast
import deit_fast.kernels
from deit_fast.kernels import _tuned

# of the package, what decides what a model launches
DECIDES = ("layers/*.py", "engine.py", "swap.py", "models.py", "quantization.py")
HEADER = ("hardware", "commit", "build", "date", "protocol", "peak_rates", "rows")


class CorruptResults(ValueError):
    """A results file that cannot be read as one; it is left as it is."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What every row carries. Times in ms, of one call; None where the status is not "measured"."""

    mode: str
    status: str = "measured"  # or "failed", or "unavailable": `note` says why
    note: str | None = None
    ms_median: float | None = None
    ms_mean: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    runs: int
    tflops: float | None = None
    fraction_of_peak_rate: float | None = None
    relative_error: float | None = None  # against eager fp32 (models), a wider dtype (kernels)
    commit: str
    build: str
    host_ms: float | None = None  # that the host takes to queue a call
    sm_mhz: float | None = None  # clock and power while it was timed
    power_w: float | None = None
    choices: str | None = None  # digest of the tuned choices, None: rules alone
    run: str | None = None  # which run of several measured it
    baseline: str | None = None  # the mode that `speedup` is over, timed in turn with this one
    speedup: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelRow(Timing):
    """One network in one mode. protocol: "batch" (a given batch, median), "paper" (the largest
    batch that fits, mean), "latency" (a given batch, each call waited for, median), "host" (as
    "batch", from pinned host memory) or "step" (as "batch", with the optimiser's step).

    peak_memory_gb: the most that is allocated at once during one warm call: weights, images,
    activations, what a CUDA graph holds, in training the gradients, in "step" the optimiser's
    state too; without what the process held before. Comparable within one protocol. None on a
    CPU."""

    network: str
    timm_name: str
    image_size: int
    protocol: str
    asked_batch: int  # wanted, or the cap of the search
    batch: int
    images_per_s: float | None = None
    peak_memory_gb: float | None = None
    channels_last: bool

    @property
    def key(self):
        return (self.timm_name, self.image_size, self.mode, self.protocol, self.asked_batch)


@dataclass(frozen=True, kw_only=True)
class KernelRow(Timing):
    """One operation on one shape. mode: "eager", "compiled", "fused" or another implementation's
    name. bytes: inputs read once and outputs written once. predicted_ms: what bytes and FLOPs take
    at the chip's peak rates, the larger of the two."""

    op: str
    network: str  # of deit_fast.kernels.cases.DEIT
    case: str
    batch: int
    dtype: str
    served_by: str
    bytes: int
    flops: int
    tb_per_s: float | None = None
    predicted_ms: float

    @property
    def key(self):
        return (self.op, self.network, self.case, self.batch, self.dtype, self.mode)


@dataclass
class Results:
    hardware: dict
    commit: str
    build: str
    date: str
    protocol: dict
    peak_rates: dict
    rows: list[ModelRow | KernelRow] = field(default_factory=list)

    def put(self, row: ModelRow | KernelRow) -> None:
        """Add a row; one of the same key gives way, at its place."""
        for i, old in enumerate(self.rows):
            if type(old) is type(row) and old.key == row.key:
                self.rows[i] = row
                return
        self.rows.append(row)

    def fresh(self, key: tuple, build: str, runs: int) -> ModelRow | KernelRow | None:
        """The row of that key, if this build measured it over as many runs."""
        for row in self.rows:
            if row.key == key and row.build == build and row.runs >= runs:
                return row
        return None

    def save(self, path: Path) -> None:
        """Write to a temporary name beside `path`, then rename: never half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {name: getattr(self, name) for name in HEADER[:-1]}
        content["rows"] = [asdict(row) for row in self.rows]
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file, indent=1, allow_nan=False)
                file.write("\n")
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def load(path: Path) -> Results:
    """Read a results file. Raises CorruptResults, naming the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptResults(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or set(content) != set(HEADER):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise CorruptResults(f"{path}: holds {found}, expected the keys {sorted(HEADER)}")
    if not isinstance(content["rows"], list):
        raise CorruptResults(f"{path}: rows is {type(content['rows']).__name__}, expected a list")
    rows = [row_of(path, i, values) for i, values in enumerate(content.pop("rows"))]
    return Results(**content, rows=rows)


def row_of(path: Path, i: int, values: dict) -> ModelRow | KernelRow:
    """A row of its fields' values. Raises CorruptResults, naming the file and the row's number."""
    if not isinstance(values, dict):
        raise CorruptResults(f"{path}: rows[{i}] is {type(values).__name__}, expected an object")
    kind = KernelRow if "op" in values else ModelRow
    known = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in known:
            raise CorruptResults(f"{path}: rows[{i}] has an unknown field {name!r}")
    for name, f in known.items():
        if name not in values:
            if f.default is MISSING:
                raise CorruptResults(f"{path}: rows[{i}] lacks {name!r}")
        elif not _fits(values[name], f.type):
            raise CorruptResults(f"{path}: rows[{i}].{name} is {values[name]!r}, expected {f.type}")
    return kind(**values)


def _fits(value, kind):
    if get_origin(kind) is UnionType:
        return any(_fits(value, k) for k in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def commit() -> str:
    """The checkout's commit, with "-dirty" where its Python files differ; else DEIT_FAST_COMMIT;
    else "unknown" (an installed package)."""
    here = Path(deit_fast.__file__).parent

    def git(*args):
        done = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if git("ls-files", "__init__.py"):
            return git("rev-parse", "HEAD") + "-dirty" * bool(
                git("status", "--porcelain", ":/*.py")
            )
    except FileNotFoundError:
        pass
    return os.environ.get("DEIT_FAST_COMMIT", "unknown")


def build(hardware: dict) -> str:
    """A digest of what decides a figure and of nothing else: the sources of the kernels and of the
    modules that call them, the tuned choices, the versions, the GPU."""
    named = ("gpu", "torch", "triton", "timm", "torchao")
    digest = hashlib.sha256(json.dumps({n: hardware.get(n) for n in named}).encode())
    digest.update(kernel_digest().encode() + str(choices_digest(hardware)).encode())
    package = Path(deit_fast.__file__).parent
    return _sources(digest, package, DECIDES)


def kernel_digest() -> str:
    """A digest of the kernels' sources."""
    return _sources(hashlib.sha256(), Path(deit_fast.kernels.__file__).parent, ("**/*.py",))


def sources() -> str:
    """A digest of every Python file of deit_fast and its kernels: which code a folder of results
    is of, wherever it lies and whether or not it is a repository."""
    package = Path(deit_fast.__file__).parent
    digest = hashlib.sha256(kernel_digest().encode())
    return _sources(digest, package, ("**/*.py",), package / "kernels")


def _sources(digest, folder, patterns, without=None):
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    for path in sorted(paths):
        if without is None or without not in path.parents:
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def choices_digest(hardware: dict) -> str | None:
    """A digest of the tuned choices that serve this GPU: operations, shapes and choices, not when
    or how fast they were measured. None: rules alone."""
    chosen = _tuned.chosen(hardware["gpu"]) if hardware["gpu"] else []
    if not chosen:
        return None
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]


def open_results(path: Path | None, hardware: dict, protocol: dict, peak_rates: dict) -> Results:
    """The file's rows under a header of today; no rows where there is no file (yet). Raises
    CorruptResults, and ValueError where the file holds another chip's results."""
    rows = []
    if path is not None and path.exists():
        old = load(path)
        rows = old.rows
        chips = [h["gpu"] or "a CPU" for h in (old.hardware, hardware)]
        if chips[0] != chips[1]:
            raise ValueError(f"{path}: holds results of {chips[0]}, this is {chips[1]}")
    today = date.today().isoformat()
    return Results(hardware, commit(), build(hardware), today, protocol, peak_rates, rows)
