"""The suite says what it measures, how far it is and when it is done."""

import io
import re
from types import SimpleNamespace

import pytest
from made_up_results import kernel_row, model_row
from test_suite import bench, parse

from benchmarks import table5
from benchmarks.progress import Progress, Reporter, clock_time, expected_seconds, row_name
from deit_fast.bench.modes import MODES


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_time_left_follows_what_rows_took():
    clock = Clock()
    progress = Progress({"a": 20.0, "b": 20.0, "c": 40.0, "d": 20.0}, clock)
    assert progress.left() == "1:40"
    assert progress.begin("a") == "[1 of 4, 0:00, about 1:40 left] a"
    clock.now += 60.0  # three times as long as expected: (60 + 20) / (20 + 20) = 2
    progress.end("a", measured=True)
    assert progress.begin("b") == "[2 of 4, 1:00, about 2:40 left] b"
    clock.now += 0.1  # kept: it says nothing of the others
    progress.end("b", measured=False)
    assert progress.begin("c") == "[3 of 4, 1:00, about 2:00 left] c"
    progress.end("c", measured=False)
    progress.end("d", measured=False)
    assert progress.left() == "0:00"


def test_clock_times():
    assert [clock_time(s) for s in (0.2, 59.6, 125, 3600, 9221)] == [
        "0:00", "1:00", "2:05", "1:00:00", "2:33:41",
    ]  # fmt: skip


def test_names_of_rows():
    for nodeid, name in (
        ("benchmarks/bench_table5.py::test_throughput[batch-ViT-B/16-eager_fp32]",
         "table5 batch-ViT-B/16-eager_fp32"),
        ("benchmarks/bench_layer_norm.py::test_layer_norm[Ti-eager]", "layer_norm Ti-eager"),
        ("benchmarks/bench_layer_norm.py::test_add_layer_norm[Ti-eager]",
         "add_layer_norm Ti-eager"),
        ("benchmarks/bench_peak_rates.py::test_peak_rates", "peak_rates"),
    ):  # fmt: skip
        assert row_name(nodeid) == name


def test_large_networks_and_compiled_ones_take_longer():
    options = parse(rows="DeiT-S,ViT-L/16")
    small, large = table5.select(["DeiT-S", "ViT-L/16"])[::-1]
    eager, compiled = MODES["eager_fp32"], MODES["compile_bf16"]

    def seconds(**params):
        return expected_seconds({"protocol": "batch", "mode": eager} | params, options)

    assert seconds(entry=small) < seconds(entry=large)
    assert seconds(entry=small) < seconds(entry=small, mode=compiled)
    assert expected_seconds({}, options) == expected_seconds({"compare": ("Ti", "", "eager", "")},
                                                             options)  # fmt: skip


class Terminal(io.StringIO):
    """As far as the reporter writes."""

    def write(self, text, flush=False):
        super().write(text)

    def write_line(self, text):
        self.write(text + "\n")

    def ensure_newline(self):
        if not self.getvalue().endswith("\n"):
            self.write("\n")


@pytest.fixture
def reporter():
    """With a terminal to read, and a suite whose rows tests make up."""
    terminal = Terminal()
    config = SimpleNamespace(
        bench_options=parse(quick=True), bench_suite=SimpleNamespace(measured=[]),
        pluginmanager=SimpleNamespace(get_plugin=lambda name: terminal),
    )  # fmt: skip
    return Reporter(config)


def report_of(nodeid, outcome="passed", when="call", longrepr=None):
    return pytest.TestReport(nodeid, ("", 0, ""), {}, outcome, longrepr, when)


def session_of(*nodeids):
    return SimpleNamespace(items=[SimpleNamespace(nodeid=nodeid) for nodeid in nodeids])


def test_each_row_has_a_line_with_what_came_of_it(reporter):
    small = table5.select(["DeiT-S"])[0]
    first = [model_row(small, images_per_s=12.34, batch=4)]
    failed = [model_row(small, status="failed", note="no")]
    cases = [  # rows, report, what is said
        (first, report_of("a"), "12.3 images/s, batch 4"),
        ([kernel_row(ms=1.5)], report_of("b"), "1.500 ms"),
        ([], report_of("c"), "done"),
        (failed, report_of("d", "failed", longrepr="not timed: no"), "not timed: no"),
        (first, report_of("e", "skipped", "call", ("", 1, "Skipped: kept: by this build")),
         "12.3 images/s, batch 4, kept"),
        ([], report_of("f", "skipped", "setup", ("", 1, "Skipped: --minutes are over")),
         "--minutes are over"),
    ]  # fmt: skip
    reporter.pytest_collection_finish(session_of(*[of.nodeid for _, of, _ in cases]))
    for rows, of, _ in cases:
        reporter.pytest_runtest_logstart(of.nodeid)
        reporter.pytest_runtest_logreport(report_of(of.nodeid, when="setup") if of.when == "call"
                                          else of)  # fmt: skip
        reporter.config.bench_suite.measured += rows
        if of.when == "call":
            reporter.pytest_runtest_logreport(of)
    announced, *lines = reporter._terminal.getvalue().strip().splitlines()
    assert announced == "6 rows, about 0:03 if nothing is kept"
    for number, (line, (_, of, said)) in enumerate(zip(lines, cases, strict=True), 1):
        assert re.fullmatch(
            rf"\[{number} of 6, 0:00, about 0:0\d left\] {of.nodeid}: {re.escape(said)}", line
        ), line


def test_the_quick_set_by_itself_is_announced(reporter):
    assert len(reporter.announcement()) == 1
    reporter.options.chosen_for_cpu = True
    said, how = reporter.announcement()
    assert said.startswith("No GPU here, so this is the quick set: 0 rows, about 0:00")
    assert "pytest benchmarks/bench_table5.py --benchmark-only --all" in how


FAKE = """
from dataclasses import replace
import torch
from made_up_results import PEAK_RATES, model_row
from benchmarks import suite, table5

torch.cuda.is_available = lambda: False
suite.peak_rates.peak_rates = lambda *args: dict(PEAK_RATES)
suite.Suite.network = lambda self, entry: entry

def measure(entry, mode, plan, limits, stamp):
    assert limits == {}
    if entry.network == "ResNet-50":
        row = model_row(entry, mode.name, status="failed", note="no luck", **stamp)
        return row, []
    row = model_row(entry, mode.name, entry.v100_images_per_s / 100, protocol=plan.protocol,
                    asked_batch=plan.batch, batch=plan.batch, runs=plan.runs, **stamp)
    row = replace(row, fraction_of_peak_rate=None, peak_memory_gb=None)
    return row, [row.ms_median] * plan.runs

suite.measure = measure
"""


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """The suite in a process where rows are made up and there is no GPU."""
    (tmp_path / "faked_rows.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:tests/helpers")

    def run(*args):
        done = bench(tmp_path / "out", "-p", "faked_rows", *args)
        assert "INTERNALERROR" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done

    return run


@pytest.mark.slow
def test_without_a_gpu_the_quick_set_is_measured_and_says_so(faked):
    done = faked("benchmarks/bench_table5.py", "-k", "not compile and not paper")
    assert "No GPU here, so this is the quick set: 13 rows, about " in done.stdout
    assert "--benchmark-only --all" in done.stdout
    lines = re.findall(r"^\[\d+ of 13, \d+:\d\d, about \d+:\d\d left\] .*$", done.stdout, re.M)
    assert len(lines) == 13, done.stdout
    assert lines[0].endswith("table5 batch-ResNet-18-eager_fp32: 44.6 images/s, batch 8")
    assert any(line.endswith("-ResNet-50-eager_fp32: not timed: no luck") for line in lines)
    assert "1 failed, 12 passed" in done.stdout
    after = done.stdout.partition("12 passed")[2]
    closing = after.partition("Table 5: images/s beside the paper's")[2]
    assert re.search(r"DeiT-S +224 +940\.4 +9\.40 \(0%\) +9\.40 \(0%\) +1\.00 +4", closing)
    assert re.search(r"Rank correlation .*: 1\.000 over 8 networks", closing), closing
    assert "of peak rate" not in done.stdout


@pytest.mark.slow
def test_all_of_table5_is_asked_for_by_one_option(faked):
    done = faked("benchmarks/bench_table5.py", "--all")
    assert "36 rows, about " in done.stdout and "quick set" not in done.stdout
    assert "1 failed, 35 passed" in done.stdout, done.stdout
    closing = done.stdout.partition("Table 5: images/s beside the paper's")[2]
    assert all(entry.network in closing for entry in table5.ENTRIES)
    assert "1.000 over 25 networks" in closing
    done = faked("benchmarks/bench_table5.py", "--all")  # what was measured is kept
    assert "batch-ResNet-18-eager_fp32: 44.6 images/s, batch 8, kept\n" in done.stdout
    assert "1 failed, 35 skipped" in done.stdout
    assert "1.000 over 25 networks" in done.stdout
