"""The whole command, rehearsed: on a CPU, on a chip that is not there, and with steps that fail."""

import json
import os

import bare_copy
import pytest
import selection

from benchmarks.lease import context, plans
from benchmarks.lease.plan import NAMES
from deit_fast import tune
from deit_fast.kernels import _chips

pytestmark = pytest.mark.slow
whole = pytest.mark.skipif(
    "LEASE_PYTHON" not in os.environ, reason="LEASE_PYTHON names an interpreter: minutes"
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    selection.compiler()
    return bare_copy.make(tmp_path_factory.mktemp("bare"))


def rows_of(folder):
    """By kind; what comes back is flat, small and few."""
    files = list(folder.iterdir())
    assert len(files) <= 8 and all(path.is_file() for path in files)
    assert all(path.stat().st_size < 16 * 2**20 for path in files)
    found = {}
    for row in context.read(folder / context.ROWS):
        found.setdefault(row["kind"], []).append(row)
    return found


def test_steps_that_fail_cost_themselves_alone(copy, tmp_path):
    """One raises, one hangs, one is killed, one loses the device; those between measure."""
    steps = ("agreement", "plans", "peak_rates", "throughput", "training", "latency", "relatives")
    arguments = (tmp_path / "out", "--library", tmp_path, "--faults", "--seconds", 540)
    done = bare_copy.run(copy, "rehearse_lease", *arguments, "--steps", *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == 1
    rows = rows_of(tmp_path / "out")
    said = {row["name"]: (row["status"], row["note"]) for row in rows["step"]}
    assert list(said) == list(steps)
    assert said["throughput"][0] == said["training"][0] == "done"
    for step, why in (
        ("agreement", "ValueError: made to raise"), ("plans", "ValueError: made to raise"),
        ("peak_rates", "killed: its time was over"), ("latency", "died of SIGKILL"),
        ("relatives", "an illegal memory access"),
    ):  # fmt: skip
        assert said[step][0] == "failed" and why in said[step][1], said[step]
    measured = {(row["step"], row["mode"]) for row in rows["model"] if row["status"] == "measured"}
    assert ("throughput", "deit_fast_engine_bf16") in measured
    assert ("training", "deit_fast_graph_amp_bf16_train") in measured
    header = json.loads((tmp_path / "out" / "lease.json").read_text())
    assert header["finished"] and header["hardware"]["plans"] == 'none: the step "plans" failed'


def done_whole(done, folder):
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(folder)
    assert {row["name"]: row["status"] for row in rows["step"]} == dict.fromkeys(NAMES, "done")
    for kind in ("smoke", "agreement", "model", "kernel"):
        failed = [row for row in rows[kind] if row["status"] == "failed"]
        assert rows[kind] and not failed, failed
    return rows


@whole
def test_every_step_on_a_cpu(copy, tmp_path):
    done = bare_copy.run(copy, "benchmarks.lease", "--out", tmp_path / "out", "--seconds", 5400)
    rows = done_whole(done, tmp_path / "out")
    modes = {row["mode"] for row in rows["model"] if row["status"] == "measured"}
    assert {"deit_fast_bf16", "compile_bf16", "deit_fast_amp_bf16_train"} <= modes


@whole
def test_every_step_on_a_chip_that_is_not_there(copy, tmp_path):
    """Kernels are launched; the steps compile nothing, the warm-up had it all."""
    arguments = (tmp_path / "out", "--library", tmp_path, "--warm")
    done = bare_copy.run(copy, "rehearse_lease", *arguments)
    rows = done_whole(done, tmp_path / "out")
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["status"] == 0 and said["warm-up"] == 0 and said["compiled"] == []
    shapes = tune.read_rows(tmp_path / "out" / "tuned.json", _chips.Chip(said["chip"], (9, 0), 132))
    assert len(shapes) > 15
    assert any(row["shape"].get("epilogue") == "gelu_backward" for row in shapes)
    more = tune.read_rows(
        tmp_path / "out" / "tuned_more.json", _chips.Chip(said["chip"], (9, 0), 132)
    )
    assert {"linear", "quantized_linear"} <= {row["op"] for row in more}, "close ones again, fp8"
    assert {row["mode"] for row in rows["plans"]} == {mode for mode, _ in plans.CALLS}
    assert {row["status"] for row in rows["plans"]} == {"passed"}
    missing = {row["mode"] for row in rows["model"] if row["status"] != "measured"}
    assert not missing
