"""How far the suite is: a line for each row when it begins, its figure, and the time left."""

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.options import Options
from benchmarks.table5 import Entry
from deit_fast.bench.results import ModelRow

# What a row takes, roughly: only the share of the time left depends on it
GMACS_PER_S = {"convnet": 8.0, "transformer": 20.0}  # of one CPU thread
ON_A_GPU = 250.0  # times as many
AROUND = 6  # calls of a row beside those that are timed: checks, warm-up
OPERATION, NETWORK = 0.5, 2.0  # seconds of an operation's row, and of making a network
COMPILING = {"default": 25.0, "reduce-overhead": 25.0, "max-autotune": 90.0}
TRUST = (
    20.0  # expected seconds that have to be over before the rate counts for as much as the guess
)


def expected_seconds(params: dict, options: Options) -> float:
    """How long a row should take, roughly.

    Args:
        params: The test's parameters, by name.
        options: Of the run.
    """
    entry, mode = params.get("entry"), params.get("mode")
    if not isinstance(entry, Entry):  # an operation, or peak rates
        compiled = "compiled" in params.get("compare", ())
        return OPERATION + compiled * COMPILING["default"] / 2
    protocol = params.get("protocol", "batch")
    batch = params.get("latency_batch") or params.get("train_batch")
    batch = batch or options.batch_of(entry, protocol)
    gmacs = entry.gmacs * batch * (3 if mode.train else 1)
    threads = torch.get_num_threads()
    call = gmacs / GMACS_PER_S[entry.family] / (ON_A_GPU if options.cuda else threads)
    calls = AROUND + options.warmup + min(options.runs, max(5, 3 / call))
    return NETWORK + call * calls + COMPILING.get(mode.compile, 0.0)


class Progress:
    """Counts rows, and estimates the time left from what the rows so far took.

    Attributes:
        done: Rows that are over.
        total: All rows.
    """

    def __init__(self, expected: dict[str, float], clock: Callable[[], float] = time.monotonic):
        """Begin.

        Args:
            expected: Seconds that each row should take, by its test's name.
            clock: Seconds.
        """
        self._left, self._clock = dict(expected), clock
        self.total, self.done = len(expected), 0
        self._start, self._row_start = clock(), clock()
        self._took, self._should = 0.0, 0.0

    def begin(self, name: str) -> str:
        """A row begins: its line, without an end."""
        self._row_start = self._clock()
        elapsed = clock_time(self._row_start - self._start)
        return f"[{self.done + 1} of {self.total}, {elapsed}, about {self.left()} left] {name}"

    def end(self, name: str, measured: bool) -> None:
        """The row is over; one that was kept or skipped says nothing of the others' times."""
        should = self._left.pop(name, 0.0)
        self.done += 1
        if measured:
            self._took += self._clock() - self._row_start
            self._should += should

    def left(self) -> str:
        """Minutes and seconds until all rows are over."""
        rate = (self._took + TRUST) / (self._should + TRUST)
        return clock_time(rate * sum(self._left.values()))


def clock_time(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def row_name(nodeid: str) -> str:
    """A test's file or function, and its parameters: "table5 batch-DeiT-S-eager_fp32"."""
    path, _, rest = nodeid.partition("::")
    of = path.rpartition("/")[2].removesuffix(".py").removeprefix("bench_")
    function, _, params = rest.partition("[")
    function = function.removeprefix("test_")
    name = function if of in function else of
    return f"{name} {params.removesuffix(']')}".strip()


class Reporter:
    """The part of the suite's pytest plugin that says how far it is, in place of dots."""

    def __init__(self, config: pytest.Config):
        """Of one run of pytest, whose options are read already."""
        self.config, self.progress = config, Progress({})
        self.options: Options = config.bench_options
        self._rows_before = 0

    @property
    def _terminal(self) -> pytest.TerminalReporter:
        return self.config.pluginmanager.get_plugin("terminalreporter")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Say what will be measured, and begin to count."""
        params = {
            i.nodeid: i.callspec.params if hasattr(i, "callspec") else {} for i in session.items
        }
        self.progress = Progress({n: expected_seconds(p, self.options) for n, p in params.items()})
        self._terminal.ensure_newline()
        for line in self.announcement():
            self._terminal.write_line(line)
        self._terminal.showfspath = False

    def announcement(self) -> list[str]:
        """What is measured, and how to get another selection."""
        progress, options = self.progress, self.options
        lines = [f"{progress.total} rows, about {progress.left()} if nothing is kept"]
        if options.chosen_for_cpu:
            lines = [
                f"No GPU here, so this is the quick set: {lines[0]}.",
                "All of Table 5: pytest benchmarks/bench_table5.py --benchmark-only --all "
                "(a quarter of an hour on two cores); every row of the suite: --all (hours).",
            ]
        return lines

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A row begins."""
        self._rows_before = len(self._rows())
        self._terminal.ensure_newline()
        self._terminal.write(self.progress.begin(row_name(nodeid)), flush=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A row is over: what came of it ends its line."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.progress.end(report.nodeid, measured=not report.skipped)
            self._terminal.write_line(f": {self.outcome(report)}")

    def outcome(self, report: pytest.TestReport) -> str:
        """A row's figure, or in one line why there is none."""
        figure = "done"
        for row in self._rows()[self._rows_before :]:
            figure = f"{row.status}: {row.note}"
            if row.status == "measured":
                figure = f"{row.ms_median:,.3f} ms"
                if isinstance(row, ModelRow):
                    figure = f"{row.images_per_s:,.1f} images/s, batch {row.batch}"
        if report.passed:
            return figure
        said = report.longrepr[2] if report.skipped else report.longreprtext
        said = (str(said).strip().splitlines() or [report.outcome])[-1]
        said = said.removeprefix("Skipped: ")
        return f"{figure}, kept" if said.startswith("kept") else said

    def _rows(self) -> list:
        suite = getattr(self.config, "bench_suite", None)
        return suite.measured if suite else []

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report, config):
        """No dots between the lines; pytest's summary counts as ever."""
        if config.get_verbosity() > 0 or report.when != "call" and report.passed:
            return None
        return report.outcome, "", ""
