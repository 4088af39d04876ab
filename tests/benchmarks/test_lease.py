"""The lease on a machine that it does not know: a bare copy, nothing installed, no GPU."""

import contextlib
import json
import math
import re
import shutil
from types import SimpleNamespace

import bare_copy
import pytest
import torch

import deit_fast
from benchmarks.lease import context, facts, models, orchestrate, plans, sanitize, smoke, tuning
from deit_fast import tune
from deit_fast.kernels import _chips, _plan_library


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return bare_copy.make(tmp_path_factory.mktemp("bare"))


def lease(copy, *arguments):
    return bare_copy.run(copy, "benchmarks.lease", *arguments)


@pytest.fixture(scope="module")
def measured(copy):
    """A run of the steps that are quick on a CPU."""
    out = copy.parent / "out"
    steps = ("peak_rates", "tune", "sanitizer")
    done = lease(copy, "--out", out, "--seconds", 2000, "--steps", *steps)
    return out, done


@pytest.mark.slow
def test_a_run_on_a_bare_copy(measured):
    out, done = measured
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split()[:2] for line in done.stdout.splitlines()]
    assert said[:3] == [["peak_rates", "done"], ["tune", "done"], ["sanitizer", "done"]]
    assert {path.name for path in out.iterdir()} <= {
        "rows.jsonl", "lease.json", "log.txt", "clocks.csv", "tuned.json",
    }  # fmt: skip
    header = json.loads((out / "lease.json").read_text())
    assert header["finished"] and header["hardware"]["gpu"] is None
    assert len(header["kernels"]) == len(header["sources"]) == 12
    rows = context.read(out / context.ROWS)
    assert {"facts", "peak_rate", "sanitizer", "step"} == {row["kind"] for row in rows}
    assert all(row["kernels"] == header["kernels"] for row in rows)
    (tool,) = [row for row in rows if row["kind"] == "sanitizer"]
    assert tool["status"] == "unavailable" and "not installed" in tool["note"]


@pytest.mark.slow
def test_what_was_done_is_kept(copy, measured):
    out, _ = measured
    again = copy.parent / "again"
    done = lease(copy, "--out", again, "--resume", out, "--seconds", 2000, "--steps", "peak_rates")
    assert done.returncode == 0, done.stdout + done.stderr
    header = json.loads((again / "lease.json").read_text())
    assert len(header["runs"]) == 2
    rows = context.read(again / context.ROWS)
    assert sum(row["kind"] == "peak_rate" for row in rows) > 4
    assert len({row["run"] for row in rows}) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chip": {"name": "NVIDIA H200"}}, "holds results of NVIDIA H200, this is"),
        ({"kernels": "0" * 12}, "is of another commit: its kernels are 000000000000"),
        ({"runs": []}, "lease.json is damaged"),
    ],
)
def test_results_that_are_none_of_these(copy, measured, tmp_path, change, said):
    earlier = tmp_path / "earlier"
    shutil.copytree(measured[0], earlier)
    header = json.loads((earlier / "lease.json").read_text())
    (earlier / "lease.json").write_text(json.dumps(header | change))
    if "kernels" in change:
        rows = (earlier / context.ROWS).read_text().replace(header["kernels"], "0" * 12)
        (earlier / context.ROWS).write_text(rows)
    done = lease(copy, "--out", tmp_path / "out", "--resume", earlier)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "full"], "full is not empty; --resume full goes on from it"),
        (["--out", "new", "--resume", "full"], "no lease.json in full"),
        (["--out", "new", "--seconds", "0"], "--seconds: 0, expected more than 0"),
        (["--out", "new", "--processes", "0"], "--processes: 0, expected 1 or more"),
        (["--out", "full/file"], "full/file is no folder"),
        ([], "--out: not given"),
    ],
)
def test_options_that_make_no_run(tmp_path, monkeypatch, capsys, arguments, said):
    from benchmarks.lease.__main__ import main

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "file").read_text() == "kept"


def test_chips_that_measure_nothing():
    facts.expect("NVIDIA H100", (9, 0), 80e9)
    with pytest.raises(RuntimeError, match="capability 7.5 has no bf16 tensor cores"):
        facts.expect("T4", (7, 5), 16e9)
    with pytest.raises(RuntimeError, match="12.0 GB of GPU memory are free, expected at least 20"):
        facts.expect("NVIDIA H100", (9, 0), 12e9)


@pytest.fixture
def ctx(tmp_path):
    return context.Context(
        torch.device("cpu"), tmp_path, True, 1e18, "smoke", "now", "0" * 12, {}, tmp_path
    )  # fmt: skip


@pytest.mark.slow
def test_a_wrong_family_is_named(ctx, monkeypatch):
    """And what PyTorch then serves; the right ones stay."""
    assert smoke.step(ctx, "linear") == smoke.step(ctx, "attention backward") == ""
    real = smoke.operations

    def broken(op):
        for operation in real(op):
            yield smoke.Operation(
                operation.name, lambda call=operation.call, **i: -call(**i), operation.reference,
                operation.inputs, operation.reads, operation.exact,
            )  # fmt: skip

    monkeypatch.setattr(smoke, "operations", broken)
    assert smoke.step(ctx, "linear") == "", "what passed is not checked again"
    assert "relative error 2.0e+00" in smoke.step(ctx, "classifier")
    assert "relative error" in smoke.step(ctx, "attention")
    rows = ctx.rows("smoke")
    failed = smoke.failed_families(rows)
    assert failed == {"classifier", "attention"}
    assert {row["status"] for row in rows if row["op"] == "linear"} == {"passed"}
    assert smoke.excluded(failed, False) == ["attention", "classifier"]
    # measured anew and right: no longer failed
    monkeypatch.setattr(smoke, "operations", real)
    assert smoke.step(ctx, "attention") == ""
    assert smoke.failed_families(ctx.rows("smoke")) == {"classifier"}


class Calls:
    """In the place of a benchmark's step: its outputs are those that are given, in turn."""

    mode = SimpleNamespace(settings=contextlib.nullcontext)
    model = torch.nn.Identity()

    def __init__(self, outputs):
        self.given = iter(outputs)

    def cast(self, images):
        return images

    def __call__(self, images):
        pass

    def outputs(self, images):
        return [torch.tensor(next(self.given))]


@pytest.mark.parametrize(
    ("outputs", "runs", "wrong"),
    [
        ([1.0, 1.0], [0, 1], ""),
        ([1.0, 1.5], [0, 1], "deit_fast_bf16, batch 1: differs from Python, by 5.0e-01"),
        ([1.0, math.nan], [0, 1], "batch 1: differs from Python, by inf"),
        ([1.0, 1.0], [4, 4], "batch 1: ran in Python: {}"),
    ],
    ids=["equal", "other bits", "no number", "in Python"],
)  # fmt: skip
def test_plans_are_compared_with_python(ctx, monkeypatch, outputs, runs, wrong):
    network = SimpleNamespace(label="N", image_size=8)
    monkeypatch.setattr(models, "network_of", lambda name, device, small: network)
    library = SimpleNamespace(runs=iter(3 * runs).__next__)
    monkeypatch.setattr(_plan_library, "loaded", library)
    monkeypatch.setattr(plans, "Step", lambda network, mode: Calls(outputs))
    with pytest.raises(RuntimeError, match=re.escape(wrong)) if wrong else contextlib.nullcontext():
        assert plans.step(ctx, "N").count("deit_fast_bf16") == 2
    rows = ctx.rows("plans")
    assert [row["status"] for row in rows] == ["failed" if wrong else "passed"] * 3
    assert all(row["plan_ms"] > 0 and row["python_ms"] > 0 for row in rows)


def test_no_plans_without_their_library(ctx, monkeypatch):
    monkeypatch.setattr(_plan_library, "loaded", None)
    monkeypatch.setattr(_plan_library, "_why_not", "there is no C++ compiler")
    assert plans.step(ctx, "N") == "unavailable, none: there is no C++ compiler"
    assert [row["status"] for row in ctx.rows("plans")] == ["unavailable"]


def test_families_that_broke_their_process():
    failed = smoke.failed_families([], ["layer_norm_mlp backward", "quantized_linear"])
    assert failed == {"layer_norm_mlp backward", "fp8", "int8"}
    assert smoke.excluded(failed, training=False) == ["fp8", "int8"]
    assert smoke.excluded(failed, training=True) == ["fp8", "int8", "linear"]


def test_a_resumed_run_leaves_out_what_failed_before(ctx):
    """The smoke test's rows and the parts that broke their process, whichever steps are asked."""
    row = {"family": "attention", "op": "attention", "network": "B", "case": "", "batch": 32}
    row |= {"dtype": "bf16", "backward": False, "status": "failed"}
    ctx.write("smoke", **row)
    ctx.write("step", name="smoke", status="failed", broken=["linear backward"])
    ctx.write("step", name="tune", status="failed", broken=["x"])
    run = SimpleNamespace(_context=lambda name, deadline: ctx)
    orchestrate.Run._learn_excluded(run)
    assert run.excluded == {"attention", "linear backward"}


def test_tuning_goes_by_value():
    """FLOPs, whatever the operation calls its sizes; and how close the next one's time is."""
    with torch.device("meta"), _chips.simulate_device(_chips.Chip("H", (9, 0), 132)):
        model = deit_fast.create_model("deit_tiny_distilled", depth=2)
    tasks = tune.tasks(model, 256, torch.bfloat16, _chips.Chip("H", (9, 0), 132), True)
    worths = {
        (t.op, shape.get("epilogue"), shape["M"], shape.get("N")): tuning.worth(t)
        for t in tasks
        for shape in [dict(t.shape)]
    }
    M = 256 * 198
    assert worths["linear", "gelu_backward", M, 768] == 2 * M * 192 * 768
    assert worths["layer_norm_mlp", None, M, None] == 4 * M * 192 * 768
    assert worths["attention", None, 256 * 3, 198] == 4 * 256 * 3 * 198 * 198 * 64
    assert tuning.closeness({"ms": 0.9, "others": {"a": 1.0, "b": 2.0, "c": None}}) == 0.9
    assert tuning.closeness({"ms": 0.9, "others": {"c": None}}) == 0.0


def test_every_operation_is_a_part():
    groups = smoke.groups(False)
    assert len(groups) == len(set(groups))
    assert {name.removesuffix(" backward") for name in groups} == set(smoke.OPS)


@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        ("40 calls on cuda\n========= ERROR SUMMARY: 0 errors", 0, ("passed", 0, "")),
        (
            "========= Invalid __global__ read of size 2 bytes\n"
            "=========     at _linear_kernel+0x40 in linear.py:190\n"
            "========= ERROR SUMMARY: 3 errors", 9, ("failed", 3, "_linear_kernel"),
        ),
        ("Traceback\nValueError: no\n========= ERROR SUMMARY: 0 errors", 1,
         ("failed", 0, "the script failed with status 1: ValueError: no")),
        ("Device not supported", 255, ("failed", None, "no summary, exit status 255")),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says(output, status, expected):
    found = sanitize.judge(output, status)
    assert (found["status"], found.get("errors")) == expected[:2] and expected[2] in found["note"]


@pytest.mark.slow
def test_the_sanitizers_script_calls_every_operation(capsys):
    calls = sanitize.launches(torch.device("cpu"))
    assert 40 <= calls <= 80
