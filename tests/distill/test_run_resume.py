"""Runs go on bit for bit where they stopped, and lose nothing."""

import csv
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import small_runs
import torch
from checking import assert_close
from small_runs import options_of, run, same, start
from tiers import slow

from deit_fast.distill import checkpoints, run_folder
from deit_fast.distill.identity import require_same_run
from deit_fast.distill.interrupt import Interrupted
from deit_fast.distill.run import Run


@pytest.mark.parametrize("epoch, update", [(0, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_bit_for_bit(epoch, update, data, whole_run, tmp_path):
    """Weights, averaged weights, optimiser, log: after a stop in the middle of an epoch and at its
    end, with dropout, stochastic depth, Mixup, CutMix and augmentation going on."""
    start(data, tmp_path, epoch, update)
    events = []
    assert same(run(data, tmp_path, save_every=1, report=events.append), whole_run[1])
    first = next(event for event in events if event["event"] == "begin")
    assert (first["epoch"], first["update"]) == (epoch, update - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"recipe_of": {"repeated_aug": 3, "layer_decay": 0.7, "sched_on_updates": True}},
        {"recipe_of": {"opt": "sgd", "auto_augment": "original"}, "accum": 2, "workers": 2},
        {"model": "test_resnet", "model_args": {"stem_width": 16}, "recipe_of": {"drop": 0.0}},
    ],
    ids=["schedule", "workers", "convnet"],
)
def test_other_runs_go_on_bit_for_bit(options, data, tmp_path):
    if "model" in options:
        options = options | {"img_size": 32}
    start(data, tmp_path / "out", **options)
    state = run(data, tmp_path / "out", save_every=1, **options)
    assert same(state, run(data, tmp_path / "whole", **options))


@pytest.mark.parametrize("amp", ["bf16", slow("fp16")])
def test_mixed_precision_goes_on_bit_for_bit(amp, data, tmp_path):
    start(data, tmp_path / "out", amp=amp)
    state = run(data, tmp_path / "out", amp=amp, save_every=1)
    assert same(state, run(data, tmp_path / "whole", amp=amp))
    assert (amp == "fp16") == bool(state["scaler"])
    assert all(math.isfinite(row["loss"]) for row in state["rows"])


@pytest.mark.slow
def test_a_run_killed_again_and_again(data, tmp_path):
    """kill -9 at random moments: the checkpoint is always whole and never older than before, and
    the run ends as one that was never killed."""
    out = tmp_path / "killed"
    script = [sys.executable, small_runs.__file__, str(data), str(out), "4", "0"]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=300)
    lines = [tuple(map(int, line.split())) for line in ended.stdout.splitlines()]
    assert [code for code, *_ in lines] == [-signal.SIGKILL] * 4 + [0], ended.stdout + ended.stderr
    places = [place for _, *place in lines]
    assert places == sorted(places)
    assert len({tuple(place) for place in places}) > 2  # it was killed at different places
    expected = run(data, tmp_path / "whole", **small_runs.KILLED)
    assert same(checkpoints.load(out / "checkpoint.pt"), expected)
    assert not list(out.glob("*.tmp"))
    rows = csv.DictReader(open(out / "log.csv"))
    assert [row["epoch"] for row in rows] == [str(n) for n in range(1, 21)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, data, whole_run, tmp_path):
    def report(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (1, 1):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="epoch 2 of 3, update") as caught:
        run(data, tmp_path, report=report)
    assert caught.value.number == number and signal.getsignal(number) is before
    state = checkpoints.load(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 1 and state["update"] > 0  # in the middle, though save_every is 1000
    assert same(run(data, tmp_path), whole_run[1])


def wait_for(process, path, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_too(data, tmp_path):
    """As torchrun and schedulers send it, more than once, to the workers as well, and while it
    evaluates."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "deit_fast", "train", str(data), "--out", str(out)]
    command += options_of(epochs=100000, workers=1)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(process, out / "checkpoint.pt")
        for _ in range(3):
            os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert checkpoints.load(out / "checkpoint.pt")
    assert "24 images to train on, 24 to evaluate on, 3 updates of 8 an epoch" in said
    assert "stopped, saved at epoch" in said and "the same command goes on" in said


@pytest.mark.slow
def test_stopped_while_it_evaluates(data, whole_run, tmp_path, monkeypatch):
    """The epoch is saved before; nothing is trained again."""
    from deit_fast.distill import evaluate

    batches = evaluate.batches

    def slow(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches(*args, **kwargs)

    monkeypatch.setattr(evaluate, "batches", slow)
    with pytest.raises(Interrupted, match="epoch 1 of 3, update 3"):
        run(data, tmp_path)
    monkeypatch.undo()
    state = checkpoints.load(tmp_path / "checkpoint.pt")
    assert (state["epoch"], state["update"]) == (0, 3)
    assert same(run(data, tmp_path), whole_run[1])


@pytest.mark.parametrize(
    "batch, save_every, what",
    [
        slow(8, 1, "weights are not finite"),
        (8, 9, "the loss is nan"),
        slow(24, 9, "weights are not"),
    ],
)
def test_what_is_not_finite_stops_it(batch, save_every, what, data, tmp_path, monkeypatch):
    """The last good checkpoint stays, and another run may start from it."""
    step = Run._step

    def spoilt(run, *batch):
        step(run, *batch)
        if run.epoch == 1:
            run.model.head.weight.data[0] = math.inf

    out = tmp_path / "bad"
    monkeypatch.setattr(Run, "_step", spoilt)
    with pytest.raises(FloatingPointError, match=f"{what}.* at epoch 2 of 3, update .; ") as caught:
        run(data, out, recipe_of={"batch": batch}, save_every=save_every)
    monkeypatch.undo()
    assert f"{out / 'checkpoint.pt'} is the last good" in str(caught.value)
    state = checkpoints.load(out / "checkpoint.pt")
    assert all(t.isfinite().all() for t in state["model"].values())
    again = run(
        data, tmp_path / "again", start=str(out / "checkpoint.pt"), img_size=16,
        model_args=small_runs.MODEL_ARGS, recipe_of={"epochs": 1, "lr": 1e-30, "min_lr": 0.0,
        "warmup_lr": 0.0},
    )  # fmt: skip
    for name, tensor in state["model"].items():
        assert_close(again["model"][name], tensor)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"recipe_of": {"lr": 2e-3}}, "lr 0.001, now 0.002"),
        ({"model": "deit_tiny"}, "model 'deit_tiny_distilled', now 'deit_tiny'"),
        ({"count": 12}, "count None, now 12"),
    ],
)
def test_another_run_in_the_folder_is_kept(changed, named, data, whole_run, tmp_path):
    before = (whole_run[0] / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="other settings.*restart") as caught:
        run(data, whole_run[0], **changed)
    assert named in str(caught.value)
    assert (whole_run[0] / "checkpoint.pt").read_bytes() == before


def test_a_run_is_not_known_by_the_names_of_files(whole_run):
    """They may change, and runs of older versions go on."""
    known = whole_run[1]["identity"]["settings"].keys()
    assert not known & {"data", "start_key", "teacher_checkpoint", "teacher_checkpoint_key"}


@pytest.mark.slow
def test_restart_throws_it_away(data, tmp_path):
    start(data, tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    events = []
    run(data, tmp_path, seed=1, restart=True, report=events.append)
    assert events[0]["epoch"] == 0 and (tmp_path / "mine.txt").read_text() == "kept"


def test_two_runs_do_not_share_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0)

    def report(event):
        if event["event"] == "begin":
            run(data, tmp_path)

    with pytest.raises(ValueError, match="another run writes into"):
        run(data, tmp_path, report=report)


def test_a_full_disk_loses_nothing(data, tmp_path):
    """The file size limit of this process stands for it."""
    start(data, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint.pt cannot be written: the one before is kep"):
            run(data, tmp_path, save_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_checkpoint_is_refused(data, tmp_path):
    start(data, tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint .*checkpoint.pt: is damaged"):
            run(data, tmp_path)
        assert path.read_bytes() == damaged
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="format None, expected 1"):
        run(data, tmp_path)


def test_a_split_off_validation_set_goes_on(data, tmp_path):
    """split.csv says what it is, and is read again."""
    options = {"data": data / "train", "holdout": 0.25}
    start(out=tmp_path / "out", **options)
    record = tmp_path / "out" / "split.csv"
    rows = list(csv.DictReader(open(record)))
    assert len(rows) == 24 and sum(row["split"] == "validation" for row in rows) == 6
    events = []
    state = run(out=tmp_path / "out", save_every=1, report=events.append, **options)
    assert (events[0]["images"], events[0]["validation"]) == (18, 6)
    assert same(state, run(out=tmp_path / "whole", **options))
    assert record.read_bytes() == (tmp_path / "whole" / "split.csv").read_bytes()
    kept = record.read_text()
    record.write_text(
        kept.replace("train\n", "validation\n", 1).replace("train\r", "validation\r", 1)
    )
    with pytest.raises(ValueError, match="other settings: train 18, now 17"):
        run(out=tmp_path / "out", **options)
    first, last = (next(r for r in rows if r["split"] == side) for side in ("train", "validation"))
    assert first["label"] == last["label"]
    first["split"], last["split"] = last["split"], first["split"]
    run_folder.write_csv(record, rows)  # as many of each class
    with pytest.raises(ValueError, match="other settings: split '"):
        run(out=tmp_path / "out", **options)
    record.unlink()  # the same is drawn anew
    run(out=tmp_path / "out", **options)
    assert record.read_text() == kept
    with pytest.raises(ValueError, match=r"other settings: holdout 0.25, now 0.5"):
        run(out=tmp_path / "out", data=data / "train", holdout=0.5)
    run(out=tmp_path / "out", data=data / "train", holdout=0.5, restart=True)
    assert record.read_text() != kept


def test_a_run_of_an_older_version_goes_on(data, whole_run):
    """Its checkpoint lacks settings that came later."""
    settings = dict(whole_run[1]["identity"]["settings"])
    del settings["holdout"]
    was = whole_run[1]["identity"] | {"settings": settings}
    require_same_run("checkpoint.pt", was, whole_run[1]["identity"])
