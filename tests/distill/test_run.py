"""Training runs: what they leave, what their steps depend on, and what they refuse."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest
import selection
import small_runs
import torch
from checking import APART, FP32, assert_close, assert_within
from small_runs import image_folders, options_of, run, same

import deit_fast
from deit_fast.cli import main
from deit_fast.distill import checkpoints
from deit_fast.distill.run import Run


def test_what_a_run_leaves(whole_run):
    out, state = whole_run
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.pt", "lock", "log.csv", "model", "model-ema", "result.json", "run.json",
        "settings.json",
    ]  # fmt: skip
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (1, 2)]
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-6, *cosine])  # an epoch warms up
    result = json.loads((out / "result.json").read_text())
    assert result["images"] == 24 and result["epoch"] == 3
    assert result["top1"]["joint"] > 50 == round(1.5 * 100 / 3)  # half again as good as guessing
    assert result["top1"]["joint"] == float(rows[-1]["top1/joint"])
    # the models: of the last epoch, and averaged
    for name, key in (("model", "model"), ("model-ema", "ema")):
        model = deit_fast.from_pretrained(out / name)
        assert same(model.state_dict(), state[key])
        assert model.pretrained_cfg["label_names"] == ("class0", "class1", "class2")
        assert model.pretrained_cfg["crop_pct"] == 1.0
    assert not same(state["model"], state["ema"])
    assert json.loads((out / "run.json").read_text()) == {
        "model": "deit_tiny_distilled", "teacher": None, "teacher_top1": None, "distill": "none",
        "distill_token": None, "img_size": 16, "epochs": 3, "seed": 0,
        "params": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


@pytest.mark.slow
def test_workers_change_nothing(data, whole_run, tmp_path):
    assert same(run(data, tmp_path, workers=2), whole_run[1])


@pytest.mark.slow
def test_every_step_draws_other_numbers(data, tmp_path):
    seeds = []
    run(data, tmp_path, report=lambda event: seeds.append((event["event"], torch.initial_seed())))
    drawn = [seed for event, seed in seeds if event == "update"]
    assert len(set(drawn)) == len(drawn) == 9


@pytest.mark.slow
def test_seeds_change_everything(data, whole_run, tmp_path):
    state = run(data, tmp_path, seed=1)
    assert state["rows"][0]["loss"] != whole_run[1]["rows"][0]["loss"]


def test_parts_of_a_batch_add_up(data, tmp_path):
    """Without dropout, whose numbers depend on the parts; and by SGD: AdamW makes a whole step of a
    gradient that is nothing but roundings, as that of the keys' bias is."""
    still = {"drop": 0.0, "drop_path": 0.0, "opt": "sgd", "lr": 0.05}
    one, two = (run(data, tmp_path / str(accum), accum=accum, recipe_of=still) for accum in (1, 2))
    for name, tensor in one["model"].items():
        assert_close(two["model"][name], tensor, name)
    assert_within(two["rows"][-1]["loss"], one["rows"][-1]["loss"], APART[FP32])


@pytest.mark.slow
def test_clipped_gradients_and_averaged_weights(data, tmp_path):
    """Next to no gradient is left of SGD's, and an average that forgets at once is the model."""
    options = {"opt": "sgd", "weight_decay": 0.0, "epochs": 1, "warmup_epochs": 0, "ema": 1e-9}
    free, clipped = (
        run(data, tmp_path / str(clip), recipe_of=options | {"clip_grad": clip})
        for clip in (0.0, 1e-9)
    )
    name = "blocks.0.mlp.fc1.weight"
    start = run(
        data, tmp_path / "0", recipe_of=options | {"lr": 1e-30, "min_lr": 0.0}, restart=True
    )
    moved = [(state["model"][name] - start["model"][name]).abs().max() for state in (free, clipped)]
    assert moved[1] < 1e-4 * moved[0]
    assert_close(free["ema"][name], free["model"][name])
    assert not torch.equal(free["ema"][name], start["model"][name])


def test_the_schedule_goes_by_updates(data, tmp_path, monkeypatch):
    """Warm-up is a line from update to update, not a step from epoch to epoch."""
    step, rates = Run._step, []

    def spy(self, *args):
        done = step(self, *args)
        rates.append(self.learner.optimizer.param_groups[0]["lr"])
        return done

    monkeypatch.setattr(Run, "_step", spy)
    warm = {"epochs": 2, "warmup_epochs": 1, "warmup_lr": 0.0, "sched_on_updates": True}
    run(data, tmp_path, recipe_of=warm)
    first = rates[: len(rates) // 2]
    assert len(first) > 2
    assert first == pytest.approx([first[1] * i for i in range(len(first))]) and first[1] > 0


@pytest.mark.slow
def test_torchrun(data, tmp_path):
    """Two ranks: the same images an update as one, the same numbers to evaluate. By SGD, as in
    test_parts_of_a_batch_add_up."""
    common = ["-m", "deit_fast", "train", str(data), "--workers", "0"]
    common += options_of(**{"drop-path": 0, "mixup-prob": 0, "opt": "sgd", "lr": 0.05})
    assert main([*common[2:], "--out", str(tmp_path / "one")]) == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*launch, *common, "--out", str(tmp_path / "two")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    one, two = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert two["rows"][-1]["scores"]["images"] == 24
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert_within(b["loss"], a["loss"], APART[FP32])
    for name, tensor in one["model"].items():
        assert_close(two["model"][name], tensor, name)
    assert json.loads((tmp_path / "two" / "settings.json").read_text())["processes"] == 2


def test_unreadable_images_are_left_out_and_named(tmp_path):
    image_folders(tmp_path / "data")
    broken = tmp_path / "data" / "train" / "class1" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    unseen = tmp_path / "data" / "val" / "class2" / "1.png"
    unseen.write_bytes(b"no image")
    notes = []
    run(tmp_path / "data", tmp_path / "out", report=notes.append, recipe_of={"epochs": 1})
    said = [event["text"] for event in notes if event["event"] == "note"]
    assert len(said) == 2 and str(broken) in said[0] and str(unseen) in said[1]
    rows = list(csv.DictReader(open(tmp_path / "out" / "unreadable.csv")))
    assert {row["image"] for row in rows} == {str(broken), str(unseen)} and rows[0]["reason"]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["unreadable"] == 2 and result["images"] == 23


def test_nothing_but_unreadable_image_folders(tmp_path):
    image_folders(tmp_path / "data")
    for path in (tmp_path / "data" / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="^data: 10 images in a row are unreadable"):
            run(tmp_path / "data", tmp_path / "out", workers=workers)


@pytest.mark.slow
def test_names_that_are_no_text(tmp_path):
    """As old archives leave them."""
    image_folders(tmp_path / "data")
    broken = tmp_path / "data" / "train" / "class1" / "3.png"
    broken.write_bytes(b"no image")
    broken.rename(broken.with_name(os.fsdecode(b"\xff.png")))
    for _ in range(2):
        run(tmp_path / "data", tmp_path / "out", recipe_of={"epochs": 1})
    assert "\\udcff.png" in (tmp_path / "out" / "unreadable.csv").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"recipe_of": {"batch": 7}, "accum": 2}, "batch: 7, expected a multiple of 2"),
        ({"recipe_of": {"batch": 9}}, "batch: 9 images on each rank, expected an even number"),
        (
            {"recipe_of": {"batch": 64}},
            "batch: 64, expected at most the 24 images that each of 1 ranks",
        ),
        ({"count": 25}, "count"),
        ({"accum": 0}, "accum: 0, expected 1 or more"),
        ({"amp": "fp8"}, "amp: 'fp8', expected one of none, bf16, fp16"),
        ({"distill": "hard"}, "teacher: none, with distill 'hard'"),
        ({"teacher": "resnet18"}, "teacher: resnet18, with distill 'none'"),
        ({"distill": "hard", "teacher": "nosuch"}, "teacher: 'nosuch' is neither a folder nor a"),
        ({"save_every": 0}, "save_every: 0, expected 1 or more"),
        ({"workers": -1}, "workers: -1, expected 0 or more"),
        ({"seed": -1}, r"seed: -1, expected 0 to 2\*\*32 - 1"),
        ({"distill": "warm"}, "distill: 'warm', expected one of"),
        ({"model_args": {"num_classes": 5}}, "model_args: num_classes is decided by the data"),
        ({"model_args": {"drop_rate": 0.5}}, "drop_rate is decided by the recipe's drop"),
        ({"model_args": {"depht": 3}}, "model: deit_tiny_distilled cannot be built with"),
        ({"model_args": {"in_chans": 4}}, "model: 4 channels, expected 1 or 3"),
    ],
)
def test_refused_by_a_run(change, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path, **change)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_hugging_face_dataset_with_columns_of_its_own(data, tmp_path):
    """As CIFAR's: "img" and "fine_label"."""
    selection.extra("train", "datasets")
    import datasets

    features = datasets.Features(
        img=datasets.Image(), fine_label=datasets.ClassLabel(names=["a", "b", "c"])
    )
    splits = {
        split: datasets.Dataset.from_dict(
            {
                "img": [str(p) for p in sorted((data / folder).rglob("*.png"))],
                "fine_label": [0] * 8 + [1] * 8 + [2] * 8,
            },
            features=features,
        )
        for split, folder in (("train", "train"), ("test", "val"))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="image"):
        run(tmp_path / "data", tmp_path / "out")
    keys = {"image_key": "img", "label_key": "fine_label"}
    state = run(tmp_path / "data", tmp_path / "out", recipe_of={"epochs": 1}, **keys)
    folders = run(data, tmp_path / "folders", recipe_of={"epochs": 1})
    assert same(state["model"], folders["model"])
    command = ["eval", str(tmp_path / "data"), "--model", str(tmp_path / "out" / "model")]
    assert (
        main([*command, "--workers", "0", "--image-key", "img", "--label-key", "fine_label"]) == 0
    )


def test_data_that_does_not_fit(tmp_path):
    image_folders(tmp_path, splits=("train",))
    image_folders(tmp_path, classes=4, splits=("val",))
    with pytest.raises(ValueError, match="class3"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_tensorboard(data, tmp_path):
    selection.extra("train", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from deit_fast.distill.recipe import load
    from deit_fast.distill.train import train

    chosen, path = load("deit", **small_runs.RECIPE), tmp_path / "checkpoint.pt"
    kept = []

    def keep(event):
        if event["event"] == "epoch" and event["epoch"] == 1:
            kept.append(path.read_bytes())

    train(small_runs.settings(data), chosen, tmp_path, tensorboard=True, report=keep)
    path.write_bytes(kept[0])  # as if killed in the second epoch: the rest is logged again
    train(small_runs.settings(data), chosen, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    for name in ("loss", "lr", "top1/joint", "ema/top5/class"):
        logged = [(e.step, e.value) for e in events.Scalars(name)]
        expected = [(int(row["epoch"]), pytest.approx(float(row[name]))) for row in rows]
        assert logged == expected, name
