"""The results file: one chip, one benchmark, every figure with the build that produced it.

    {"hardware": {...}, "commit": "<sha>", "build": "<digest>", "date": "2026-11-21",
     "protocol": {...}, "peak_rates": {"bf16_tflops": 788.0, "copy_tb_per_s": 4.3}, "rows": [...]}

A row is a `ModelRow` or a `KernelRow`. Its `build` is a digest of what decides a figure: the
sources of kernels and layers, the tuned choices, the versions of torch, triton, timm and torchao,
and the GPU, or without one the CPU and its threads. Rows are comparable where it is the same. The
file's own `hardware`, `commit`, `build` and `date` are those of the last run that wrote it. The
JSON schema is benchmarks/results.schema.json.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import deit_fast
import deit_fast.kernels
from deit_fast.kernels import _tuned

# the package's modules, or packages, that decide what a model launches
DECIDES = (
    "layers", "engine", "_cuda_graph", "_engine_checks", "_engine_images",
    "_model_config", "swap", "models", "heads", "quantization", "activation_scales", "_names",
)  # fmt: skip
HEADER = ("hardware", "commit", "build", "date", "protocol", "peak_rates", "rows")
OTHER_FORMATS = ("race.json",)  # files beside them that benchmarks/cpu_race writes
RENAMED = {"ceilings": "peak_rates", "fraction_of_ceiling": "fraction_of_peak_rate"}  # before 0.1


class CorruptResults(ValueError):
    """A results file that cannot be read as one; it is left as it is."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What every row has. Times are of one call, in ms; None unless the status is "measured"."""

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
    """One network in one mode.

    Protocols: "batch" (a given batch, median), "paper" (the largest batch that fits, mean),
    "latency" (a given batch, each call waited for, median), "host" (as "batch", from pinned host
    memory) and "step" (as "batch", with the optimizer's step).

    `peak_memory_gb` is the most that is allocated at once during one warm call, without what the
    process held before: weights, images, activations, what a CUDA graph holds, in training the
    gradients, and in "step" the optimizer's state. It is comparable within one protocol, and None
    on a CPU.
    """

    network: str
    timm_name: str
    image_size: int
    protocol: str
    asked_batch: int  # as the plan has it; of "paper" the cap of the search
    batch: int
    images_per_s: float | None = None
    peak_memory_gb: float | None = None
    channels_last: bool

    @property
    def key(self) -> tuple:
        """What makes it the same row in another run."""
        return (self.timm_name, self.image_size, self.mode, self.protocol, self.asked_batch)


@dataclass(frozen=True, kw_only=True)
class KernelRow(Timing):
    """One operation on one shape.

    The mode is "eager", "compiled", "fused" or another implementation's name. `bytes` counts inputs
    read once and outputs written once. `predicted_ms` is what bytes or FLOPs take at the chip's
    peak rates, the larger of the two.
    """

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
    def key(self) -> tuple:
        """What makes it the same row in another run."""
        return (self.op, self.network, self.case, self.batch, self.dtype, self.mode)


@dataclass
class Results:
    """A results file: the header of the last run that wrote it, and rows of this and other runs."""

    hardware: dict
    commit: str
    build: str
    date: str
    protocol: dict
    peak_rates: dict
    rows: list[ModelRow | KernelRow] = field(default_factory=list)

    def put(self, row: ModelRow | KernelRow) -> None:
        """Add a row, or put it in the place of the one with the same key."""
        for i, old in enumerate(self.rows):
            if type(old) is type(row) and old.key == row.key:
                self.rows[i] = row
                return
        self.rows.append(row)

    def fresh(self, key: tuple, build: str, runs: int) -> ModelRow | KernelRow | None:
        """The row of that key, if this build measured it with at least as many runs; or None."""
        for row in self.rows:
            if row.key == key and row.build == build and row.runs >= runs:
                return row
        return None

    def document(self) -> dict:
        """What the file holds, as `json` takes it."""
        header = {name: getattr(self, name) for name in HEADER[:-1]}
        return header | {"rows": [asdict(row) for row in self.rows]}

    def save(self, path: Path) -> None:
        """Write to a temporary file beside `path`, then rename it: never half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(self.document(), file, indent=1, allow_nan=False)
                file.write("\n")
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def paths(folder: Path) -> list[Path]:
    """The results files of a chip's folder."""
    return sorted(p for p in folder.glob("*.json") if p.name not in OTHER_FORMATS)


def load(path: Path) -> Results:
    """Read a results file, also one with the names of before 0.1.

    Raises:
        CorruptResults: The message names the file and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text(), object_hook=_renamed)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptResults(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or set(content) != set(HEADER):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise CorruptResults(f"{path}: holds {found}, expected the keys {sorted(HEADER)}")
    if not isinstance(content["rows"], list):
        raise CorruptResults(f"{path}: rows is {type(content['rows']).__name__}, expected a list")
    rows = [row_of(path, i, values) for i, values in enumerate(content.pop("rows"))]
    return Results(**content, rows=rows)


def _renamed(values: dict) -> dict:
    return {RENAMED.get(name, name): value for name, value in values.items()}


def row_of(path: Path, i: int, values: dict) -> ModelRow | KernelRow:
    """Make a row of its fields' values, and check their types.

    Args:
        path: The file, for the error.
        i: The row's number in it, for the error.
        values: The row as JSON has it.

    Raises:
        CorruptResults: A field is unknown, missing or of another type.
    """
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


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is UnionType:
        return any(_fits(value, k) for k in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def commit() -> str:
    """The commit of the code that runs.

    Returns:
        The checkout's, with "-dirty" where its Python files differ from it; of an installed package
        the environment's DEIT_FAST_COMMIT, or "unknown".
    """
    here = Path(deit_fast.__file__).parent

    def git(*args: str) -> str:
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
    """A digest of what decides a figure, and of nothing else.

    That is the sources of the kernels and of the modules that call them, the tuned choices, the
    versions and the GPU; without one, the CPU and its threads.

    Args:
        hardware: As `device.hardware` returns it.
    """
    named = ["gpu", "torch", "triton", "timm", "torchao"]
    named += ["cpu", "threads"] if hardware["gpu"] is None else ["plans"]
    digest = hashlib.sha256(json.dumps({n: hardware.get(n) for n in named}).encode())
    digest.update(kernel_digest().encode() + str(choices_digest(hardware)).encode())
    package = Path(deit_fast.__file__).parent
    decides = (pattern for name in DECIDES for pattern in (f"{name}.py", f"{name}/**/*.py"))
    return _sources(digest, package, decides)


def kernel_digest() -> str:
    """A digest of the kernels' sources, those in folders too."""
    folder = Path(deit_fast.kernels.__file__).parent
    return _sources(hashlib.sha256(), folder, ("**/*.py", "csrc/*"))


def sources() -> str:
    """A digest of every Python file of deit_fast and its kernels.

    It tells which code a folder of results is of, wherever the code lies and whether or not it is a
    repository.
    """
    package = Path(deit_fast.__file__).parent
    digest = hashlib.sha256(kernel_digest().encode())
    return _sources(digest, package, ("**/*.py",), package / "kernels")


def _sources(
    digest: "hashlib._Hash", folder: Path, patterns: Iterable[str], without: Path | None = None
) -> str:
    """Add files of `folder`, their names and contents, to a digest; returns 12 hex digits."""
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    for path in sorted(paths):
        if without is None or without not in path.parents:
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def choices_digest(hardware: dict) -> str | None:
    """A digest of the tuned choices that serve this GPU, or None where there are rules alone.

    It is of operations, shapes and choices, not of when or how fast they were measured.
    """
    chosen = _tuned.chosen(hardware["gpu"]) if hardware["gpu"] else []
    if not chosen:
        return None
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]


def open_results(path: Path | None, hardware: dict, protocol: dict, peak_rates: dict) -> Results:
    """Open a results file for another run: its rows, if there is one, under a new header.

    Args:
        path: The file, which need not exist; None for no file.
        hardware: As `device.hardware` returns it.
        protocol: How this run measures.
        peak_rates: The chip's, as `peak_rates.peak_rates` returns them.

    Raises:
        CorruptResults: The file cannot be read as one.
        ValueError: The file holds another chip's results.
    """
    rows: list[ModelRow | KernelRow] = []
    if path is not None and path.exists():
        old = load(path)
        rows = old.rows
        chips = [h["gpu"] or f"a CPU ({h['cpu']})" for h in (old.hardware, hardware)]
        if chips[0] != chips[1]:
            raise ValueError(f"{path}: holds results of {chips[0]}, this is {chips[1]}")
    today = date.today().isoformat()
    return Results(hardware, commit(), build(hardware), today, protocol, peak_rates, rows)
