"""One run of the benchmark files: the open results files, the rows that are measured."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_rows, table5
from benchmarks.operations import Operation
from benchmarks.options import IMPLEMENTATIONS, Options
from deit_fast.bench import device as devices
from deit_fast.bench import peak_rates, profiling, results, timing
from deit_fast.bench.failures import LOST
from deit_fast.bench.measure import Plan, TooSlow, measure
from deit_fast.bench.modes import PRECISIONS, Mode
from deit_fast.bench.network import Network

GRACE = 60.0  # seconds that a row begun in time may take over it


class Replay:
    """A timer for pytest-benchmark: it replays times that the device's clock has taken."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        """The time so far, in seconds."""
        return self.now

    def play(self, benchmark, times_ms: list[float]) -> None:
        """Hand these times to the fixture of pytest-benchmark."""
        left = iter(times_ms)

        def advance():
            self.now += next(left) / 1e3

        benchmark.pedantic(advance, rounds=len(times_ms))


REPLAY = Replay()


@dataclass
class Suite:
    """One run on one device."""

    options: Options
    device: torch.device
    hardware: dict
    stamp: dict  # of every row: commit, build
    folder: Path
    files: dict = field(default_factory=dict)
    measured: list = field(default_factory=list)
    profiles: list = field(default_factory=list)
    limits: dict | None = None  # the peak rates, once they are asked for
    _network: tuple = (None, None)

    @classmethod
    def start(cls, options: Options) -> "Suite":
        """On the GPU, where there is one."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        hardware = devices.hardware(device)
        stamp = {"commit": results.commit(), "build": results.build(hardware)}
        return cls(options, device, hardware, stamp, options.out / devices.slug(device))

    @property
    def table5_entries(self) -> list[table5.Entry]:
        """The rows of Table 5 that the options choose, in its order."""
        chosen = {*self.options.rows, *self.options.small_rows}
        return [entry for entry in table5.ENTRIES if entry in chosen]

    @property
    def protocol(self) -> dict:
        """How a row is timed, as the results file says it."""
        timer = "cuda events" if self.device.type == "cuda" else "perf_counter"
        return {"runs": self.options.runs, "warmup": self.options.warmup, "timer": timer}

    def peak_rates(self, again: bool = False) -> dict:
        """The chip's peak rates, measured once and kept for these versions on this chip."""
        path = self.folder / "peak_rates.json"
        if self.limits is None and path.exists() and not again:
            kept = results.load(path)
            runs = min(self.options.runs, peak_rates.PEAK_RATE_RUNS)
            if kept.hardware == self.hardware and kept.protocol["runs"] >= runs:
                self.limits = kept.peak_rates
        if self.limits is None or again:
            self.limits = peak_rates.peak_rates(self.device, self.options.runs)
            results.open_results(path, self.hardware, self.protocol, self.limits).save(path)
        return self.limits

    def network(self, entry: table5.Entry) -> Network:
        """The network, kept until another is asked for."""
        if self._network[0] != entry.measured_as:
            self._network = (None, None)
            timing.release(self.device)
            built = Network(entry.timm_name, entry.image_size, self.device, entry.network)
            self._network = (entry.measured_as, built)
        return self._network[1]

    def open(self, name: str) -> results.Results:
        """The results file of that name; its rows so far are kept."""
        if name not in self.files:
            path = self.folder / f"{name}.json"
            self.files[name] = results.open_results(
                path, self.hardware, self.protocol, self.peak_rates()
            )
        return self.files[name]

    def keep_or_stop(self, name: str, key: tuple) -> None:
        """End the test where this build has the row already, and all once the time is up."""
        kept = self.open(name).fresh(key, self.stamp["build"], self.options.runs)
        lost = kept is not None and (kept.note or "").startswith(LOST)  # maybe by another's fault
        if kept is not None and not lost and not self.options.again:
            self.measured.append(kept)
            if kept.status == "unavailable":
                pytest.skip(f"unavailable: {kept.note}")
            if kept.status == "failed":  # or a stage would stumble over it each time
                pytest.fail(f"not timed: {kept.note} (kept; --again tries anew)", pytrace=False)
            pytest.skip("kept: measured by this build on this chip")
        if self.left() <= 0:
            pytest.skip("--minutes are over: run again to go on from here")

    def left(self) -> float:
        """Seconds until no further row is begun."""
        return self.options.deadline - time.monotonic()

    def record(self, benchmark, name: str, row, times: list[float]) -> None:
        """Save a row, and hand its times to pytest-benchmark."""
        file = self.open(name)
        file.put(row)
        file.save(self.folder / f"{name}.json")
        self.measured.append(row)
        if row.status == "unavailable":
            pytest.skip(f"unavailable: {row.note}")
        if row.status != "measured":
            if row.note.startswith(LOST):
                pytest.exit(f"the device is lost ({row.note}); run again to go on", returncode=5)
            pytest.fail(f"not timed: {row.note}", pytrace=False)
        fields = ("batch", "tflops", "fraction_of_peak_rate", "relative_error", "note")
        benchmark.extra_info |= {f: getattr(row, f) for f in fields}
        REPLAY.play(benchmark, times)

    def measure(self, benchmark, name: str, entry: table5.Entry, mode: Mode, plan: Plan) -> None:
        """Measure one network in one mode, for the results file of that name."""
        key = (*entry.measured_as, mode.name, plan.protocol, plan.batch)
        self.keep_or_stop(name, key)
        network = self.network(entry)
        plan = replace(plan, seconds=max(0.0, self.left()) + GRACE)
        try:
            limits = peak_rates.of_rows(self.peak_rates(), self.device)
            row, times = measure(network, mode, plan, limits, self.stamp)
        except TooSlow as error:
            pytest.skip(f"--minutes do not suffice: {error}")
        self.record(benchmark, name, row, times)
        if row.images_per_s:
            benchmark.extra_info["images_per_s"] = row.images_per_s
        if self.options.profile:
            self.profiles.append(profiling.profile_row(network, row, self.folder / "traces"))

    def measure_operation(
        self, benchmark, operation: Operation, inputs, network, case, implementation,
        backward=False,
    ) -> None:  # fmt: skip
        """Measure one implementation of one operation on one of DeiT's shapes.

        The arguments are those of `kernel_rows.measure`.
        """
        batch = min(self.options.batch, self.options.max_batch)
        if self.device.type == "cpu" and implementation not in IMPLEMENTATIONS:
            pytest.skip(f"{implementation} needs a CUDA device")
        name, precision = (
            kernel_rows.case_name(case, backward),
            PRECISIONS[kernel_rows.dtype_of(self.device)],
        )
        key = (operation.name, network, name, batch, precision, implementation)
        self.keep_or_stop("kernels", key)
        row, times = kernel_rows.measure(
            operation, inputs, network, case, batch, implementation, self.device, self.peak_rates(),
            self.stamp, self.options.runs, self.options.warmup, backward,
        )  # fmt: skip
        if times:
            benchmark.extra_info |= {
                "bytes": row.bytes, "flops": row.flops, "device_ms": row.ms_median
            }  # fmt: skip
        self.record(benchmark, "kernels", row, times)
