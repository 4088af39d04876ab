"""A step that raises, hangs, is killed or corrupts its device costs itself alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.lease import context, runner
from benchmarks.lease.background import Background
from benchmarks.lease.plan import Step

FAULTS = "test_lease_runner"


class Lost(RuntimeError):
    """As a sticky CUDA error: the process can't use its device any more."""


def parts(small):
    return ["one", "two", "three"]


def many(small):
    return list("abcdefgh")


def whole(ctx):
    ctx.write("note", text="written")
    return "all of it"


def unhurt(ctx, part):
    ctx.write("note", text=part)
    return f"{part} measured"


def raises(ctx, part):
    if part == "two":
        raise ValueError("no such tile\nsecond line")
    return unhurt(ctx, part)


def dies(ctx, part):
    if part == "two":
        os.kill(os.getpid(), signal.SIGSEGV)
    return unhurt(ctx, part)


def dies_once(ctx, part):
    marker = ctx.folder / "died"
    if part == "two" and not marker.exists():
        marker.touch()
        os._exit(7)
    return unhurt(ctx, part)


def loses(ctx, part):
    """Whoever goes on in the same process fails as well."""
    if part == "two" or ctx.__dict__.get("corrupt"):
        ctx.corrupt = True
        raise Lost("CUDA error: an illegal memory access was encountered")
    return unhurt(ctx, part)


def hangs(ctx, part):
    if part == "two":
        subprocess.Popen(["sleep", "600"])  # a grandchild that holds the pipe
        time.sleep(600)
    return unhurt(ctx, part)


def late(ctx, part):
    time.sleep(0.3)
    return unhurt(ctx, part)


def not_yet(ctx, part):
    if part == "two":
        raise context.NotReady("not compiled yet")
    return unhurt(ctx, part)


def nothing(ctx):
    os._exit(9)


@pytest.fixture
def run(tmp_path):
    def start(function, parts="parts", budget=20.0, limit=25.0):
        def make(deadline):
            return context.Context(
                None, tmp_path, True, deadline, "step", "now", "0" * 12, {}, tmp_path
            )  # fmt: skip

        step = Step("step", budget, "", f"{FAULTS}:{function}", parts and f"{FAULTS}:{parts}")
        log = tmp_path / "log.txt"
        outcome = runner.run(step, make, budget, limit, log, lambda e: isinstance(e, Lost))
        outcome.written = [row["text"] for row in context.read(tmp_path / context.ROWS)]
        outcome.log = log.read_text() if log.exists() else ""
        return outcome

    return start


def test_a_step_that_works(run):
    outcome = run("whole", None)
    assert (outcome.status, outcome.summary, outcome.notes) == ("done", "all of it", [])
    assert outcome.written == ["written"]
    outcome = run("unhurt")
    assert outcome.status == "done" and outcome.summary.startswith("one: one measured; two: ")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("raises", "two: ValueError: no such tile"),
        ("dies", "two: the process died of SIGSEGV"),
        ("loses", "two: Lost: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_the_other_parts_are_measured(run, function, why):
    outcome = run(function)
    assert outcome.status == "failed" and outcome.notes == [why]
    assert outcome.written == ["one", "three"]
    assert outcome.seconds < 20
    assert ("Traceback" in outcome.log) == (function != "dies")


def test_a_part_that_broke_its_process_is_tried_once_more(run):
    outcome = run("dies_once")
    assert (outcome.status, outcome.notes) == ("done", [])
    assert outcome.written == ["one", "three", "two"]


@pytest.mark.slow
def test_a_hang_is_killed_with_all_that_it_started(run, monkeypatch):
    """And the parts behind it still have time; the log says where it hung."""
    monkeypatch.setattr(runner, "LEAST_KILL", 0.5)
    outcome = run("hangs", budget=6.0, limit=12.0)
    assert outcome.notes == ["two: killed: its time was over"]
    assert "in hangs" in outcome.log
    assert outcome.written == ["one", "three"] and outcome.seconds < 12
    sleeping = subprocess.run(["pgrep", "-f", "^sleep 600$"], capture_output=True, text=True)
    assert not sleeping.stdout.split(), "a process outlives its step"


def test_time_that_is_over(run):
    """Nothing new is begun; what was not is named."""
    outcome = run("late", "many", budget=1.0, limit=30.0)
    begun = len(outcome.written)
    assert 1 <= begun <= 5 and outcome.seconds < 20
    assert outcome.status == "partial" and len(outcome.notes) == 8 - begun
    assert outcome.notes[-1] == "h: not begun, no time left"


def test_the_last_part_may_use_the_grace_and_no_more(run):
    outcome = run("hangs", "parts", budget=0.5, limit=1.0)
    assert outcome.seconds < 20 and outcome.status == "failed"


def test_a_part_that_is_not_ready_is_no_failure(run):
    outcome = run("not_yet")
    assert outcome.status == "partial" and outcome.notes == ["two: not compiled yet"]
    assert outcome.written == ["one", "three"]


def test_a_process_that_dies_before_it_begins(run):
    outcome = run("nothing", None)
    assert outcome.notes == ["the process ended with status 9"] and outcome.status == "failed"


def test_a_step_that_cannot_be_loaded(run):
    outcome = run("absent", None)
    assert outcome.status == "failed" and "absent" in outcome.notes[0]


def test_rows_are_whole(tmp_path):
    """A line that a killed step left unfinished is dropped; the next begins anew."""
    path = tmp_path / context.ROWS
    context.append(path, {"kind": "note", "kernels": "a", "n": 1})
    with path.open("a") as file:
        file.write('{"kind": "note", "kern')
    context.append(path, {"kind": "note", "kernels": "a", "n": 2})
    assert [row["n"] for row in context.read(path)] == [1, 2]
    with pytest.raises(ValueError):
        context.append(path, {"kind": "note", "kernels": "a", "n": float("nan")})
    assert [row["n"] for row in context.read(path)] == [1, 2]


def test_rows_of_other_kernels_do_not_count(tmp_path):
    old, new = (
        context.Context(None, tmp_path, True, 0.0, "step", "now", kernels, {}, tmp_path)
        for kernels in ("old", "new")
    )
    old.write("note", n=1)
    new.write("note", n=2)
    new.write("other", n=3)
    assert [row["n"] for row in new.rows("note")] == [2]
    assert json.loads((tmp_path / context.ROWS).read_text().splitlines()[0])["kernels"] == "old"


def test_background_work_stands_still_while_it_is_paused(tmp_path):
    beats = tmp_path / "beats"

    def beat():
        child = os.fork()  # the whole group, not the process alone
        while True:
            with beats.open("a") as file:
                file.write("+" if child else "-")
            time.sleep(0.01)

    background = Background(tmp_path / "log.txt")
    background.start("beat", beat)
    try:
        until = time.monotonic() + 10
        while not beats.exists() or len(set(beats.read_text())) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        background.pause()
        time.sleep(0.1)
        before = beats.read_text()
        time.sleep(0.2)
        assert beats.read_text() == before
        background.resume()
        time.sleep(0.3)
        grown = beats.read_text()[len(before) :]
        assert {"+", "-"} == set(grown)
        assert background.running() == ["beat"] and not background.wait("beat", 0.1)
    finally:
        background.stop()
    time.sleep(0.1)
    before = beats.read_text()
    time.sleep(0.2)
    assert beats.read_text() == before and background.running() == []


def test_background_work_that_ends(tmp_path):
    background = Background(tmp_path / "log.txt")
    background.start("good", lambda: print("said"))
    background.start("bad", lambda: 1 / 0)
    assert background.wait("good", 10) and background.wait("bad", 10)
    assert background.ended == {"good": 0, "bad": 1}
    text = (tmp_path / "log.txt").read_text()
    assert "said" in text and "ZeroDivisionError" in text


def test_nothing_heavy_is_loaded_to_say_what_is_wrong(tmp_path):
    code = (
        "import sys; from benchmarks.lease.__main__ import main\n"
        "status = main(['--steps', 'smok', '--out', sys.argv[1]])\n"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "unknown smok, expected some of smoke agreement" in done.stderr
    assert not (tmp_path / "out").exists()
