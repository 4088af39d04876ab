"""Frozen blocks, adapters, balance and the best epoch: killed, stopped and shared by ranks, a run
ends as one that nothing disturbed."""

import csv
import os
import signal
import subprocess
import sys

import pytest
import selection
import small_runs
from checking import APART, FP32, assert_close, assert_within
from small_runs import MODES, options_of, run, same, start
from tiers import slow

from deit_fast.cli import main
from deit_fast.distill import checkpoints
from deit_fast.distill.interrupt import Interrupted

EACH = pytest.mark.parametrize("mode", ["freeze", "best", slow("lora")])


def needs(mode):
    if mode == "lora":
        selection.extra("tools", "peft")
    return MODES[mode]


def files(out):
    return {path.name: path.read_bytes() for path in out.glob("model*/*.safetensors")}


@EACH
def test_it_goes_on_bit_for_bit(mode, data, tmp_path):
    options = needs(mode)
    start(data, tmp_path / "out", 1, 2, **options)
    state = run(data, tmp_path / "out", save_every=1, **options)
    assert same(state, run(data, tmp_path / "whole", **options))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
@EACH
def test_killed_again_and_again(mode, data, tmp_path):
    needs(mode)
    out = tmp_path / "killed"
    script = [sys.executable, small_runs.__file__, str(data), str(out), "4", "0", mode]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=400)
    lines = [tuple(map(int, line.split())) for line in ended.stdout.splitlines()]
    assert [code for code, *_ in lines] == [-signal.SIGKILL] * 4 + [0], ended.stdout + ended.stderr
    expected = run(data, tmp_path / "whole", **small_runs.killed(mode))
    assert same(checkpoints.load(out / "checkpoint.pt"), expected)
    (best,) = (tmp_path / "whole").glob("best-*.pt")
    assert [path.name for path in out.glob("best-*")] == [best.name]
    assert same(checkpoints.load(out / best.name), checkpoints.load(best))
    assert files(out).keys() == {"model.safetensors"} and files(out) == files(tmp_path / "whole")
    rows = csv.DictReader(open(out / "log.csv"))
    assert [row["epoch"] for row in rows] == [str(n) for n in range(1, 21)]


@pytest.mark.slow
@EACH
def test_a_signal_saves_and_stops(mode, data, tmp_path):
    def report(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    options = needs(mode)
    with pytest.raises(Interrupted, match="epoch 2 of 3, update"):
        run(data, tmp_path / "out", report=report, **options)
    state = run(data, tmp_path / "out", **options)
    assert same(state, run(data, tmp_path / "whole", **options))


@pytest.mark.slow
@EACH
def test_two_ranks(mode, data, tmp_path):
    """The same images an update as one, the same scores, and the same best epoch. By SGD, as in
    test_parts_of_a_batch_add_up. Their options are those of the command line."""
    options = needs(mode) | needs(mode).get("recipe_of", {})
    given = {name: value for name, value in options.items() if name != "recipe_of"}
    common = ["-m", "deit_fast", "train", str(data), "--workers", "0"]
    plain = {"drop-path": 0, "mixup-prob": 0, "opt": "sgd", "lr": 0.05}
    common += options_of(**plain, **given)
    assert main([*common[2:], "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, *common, "--out", str(tmp_path / "two")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    one, two = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert_within(b["loss"], a["loss"], APART[FP32])
        assert_within(b["scores"]["loss"], a["scores"]["loss"], APART[FP32])
        assert b["scores"]["images"] == 24
        assert a["scores"]["balanced"] == pytest.approx(b["scores"]["balanced"])
    for name, tensor in one["model"].items():
        assert_close(two["model"][name], tensor, name)
    assert [p.name for p in (tmp_path / "two").glob("best-*")] == [
        p.name for p in (tmp_path / "one").glob("best-*")
    ]
    assert sorted(p.name for p in (tmp_path / "two" / "model").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
