"""Training runs: that they learn, go on bit for bit, survive, and refuse what does not fit."""

import csv
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import selection
import small_runs
import timm
import torch
from checking import APART, FP32, assert_close, assert_within, seeded
from small_runs import options_of, pictures, run, same
from tiers import slow

import deit_fast
from deit_fast.cli import main
from deit_fast.distill import checkpoints, folder, recipe
from deit_fast.distill.processes import Interrupted
from deit_fast.distill.student import parameter_groups, student
from deit_fast.distill.train import Run
from deit_fast.models import create_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """(folder, last checkpoint) of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(data, out)


class Stop(Exception):
    pass


def stop_at(epoch, update):
    def report(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (epoch, update):
            raise Stop

    return report


def start(data, out, epoch=1, update=2, **kwargs):
    """A run that ends just after that update and before saving it."""
    with pytest.raises(Stop):
        run(data, out, report=stop_at(epoch, update), save_every=1, **kwargs)


def test_what_a_run_leaves(whole):
    out, state = whole
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


@pytest.mark.parametrize("epoch, update", [(0, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_bit_for_bit(epoch, update, data, whole, tmp_path):
    """Weights, averaged weights, optimiser, log: after a stop in the middle of an epoch and at its
    end, with dropout, stochastic depth, Mixup, CutMix and augmentation going on."""
    start(data, tmp_path, epoch, update)
    events = []
    assert same(run(data, tmp_path, save_every=1, report=events.append), whole[1])
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


def test_dropout_and_stochastic_depth(data):
    """Of positions, projections and MLPs, as the official code; a convnet's of its head."""
    chosen = recipe.load("deit", **small_runs.RECIPE)
    _, _, model = student(small_runs.settings(data), chosen)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    last = model.blocks[-1]
    rates = [model.pos_drop.p, last.attn.proj_drop.p, last.mlp.drop1.p, last.mlp.drop2.p]
    assert rates == [0.1] * 4 and model.head_drop.p == last.attn.attn_drop.p == 0.0
    _, _, model = student(small_runs.settings(data, "test_resnet"), chosen)
    assert model.drop_rate == 0.1
    images, validation, _ = student(small_runs.settings(data, count=6), chosen)
    assert len(images) == 6 and sorted(images.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert len(validation) == 24


@pytest.mark.slow
def test_workers_change_nothing(data, whole, tmp_path):
    assert same(run(data, tmp_path, workers=2), whole[1])


@pytest.mark.slow
def test_every_step_draws_other_numbers(data, tmp_path):
    seeds = []
    run(data, tmp_path, report=lambda event: seeds.append((event["event"], torch.initial_seed())))
    drawn = [seed for event, seed in seeds if event == "update"]
    assert len(set(drawn)) == len(drawn) == 9


@pytest.mark.slow
def test_seeds_change_everything(data, whole, tmp_path):
    state = run(data, tmp_path, seed=1)
    assert state["rows"][0]["loss"] != whole[1]["rows"][0]["loss"]


def test_parts_of_a_batch_add_up(data, tmp_path):
    """Without dropout, whose numbers depend on the parts; and by SGD: AdamW makes a whole step of a
    gradient that is nothing but roundings, as that of the keys' bias is."""
    still = {"drop": 0.0, "drop_path": 0.0, "opt": "sgd", "lr": 0.05}
    one, two = (run(data, tmp_path / str(accum), accum=accum, recipe_of=still) for accum in (1, 2))
    for name, tensor in one["model"].items():
        assert_close(two["model"][name], tensor, name)
    assert_within(two["rows"][-1]["loss"], one["rows"][-1]["loss"], APART[FP32])


@pytest.mark.slow
def test_killed_again_and_again(data, tmp_path):
    """kill -9 at random row statistics: the checkpoint is always whole and never older than before, and
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
def test_a_signal_saves_and_stops(number, data, whole, tmp_path):
    def report(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (1, 1):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="epoch 2 of 3, update") as caught:
        run(data, tmp_path, report=report)
    assert caught.value.number == number and signal.getsignal(number) is before
    state = checkpoints.load(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 1 and state["update"] > 0  # in the middle, though save_every is 1000
    assert same(run(data, tmp_path), whole[1])


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
def test_stopped_while_it_evaluates(data, whole, tmp_path, monkeypatch):
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
    assert same(run(data, tmp_path), whole[1])


@pytest.mark.parametrize(
    "batch, save_every, what",
    [
        slow(8, 1, "weights are not finite"),
        (8, 9, "the loss is nan"),
        slow(24, 9, "weights are not"),
    ],
)
def test_what_is_no_number_stops_it(batch, save_every, what, data, tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"recipe_of": {"lr": 2e-3}}, "lr 0.001, now 0.002"),
        ({"model": "deit_tiny"}, "model 'deit_tiny_distilled', now 'deit_tiny'"),
        ({"count": 12}, "count None, now 12"),
    ],
)
def test_another_run_in_the_folder_is_kept(changed, named, data, whole, tmp_path):
    before = (whole[0] / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="other settings.*restart") as caught:
        run(data, whole[0], **changed)
    assert named in str(caught.value)
    assert (whole[0] / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_restart_throws_it_away(data, tmp_path):
    start(data, tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    events = []
    run(data, tmp_path, seed=1, restart=True, report=events.append)
    assert events[0]["epoch"] == 0 and (tmp_path / "mine.txt").read_text() == "kept"


def test_two_runs_do_not_share_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 0)

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


def test_unreadable_pictures_are_left_out_and_named(tmp_path):
    pictures(tmp_path / "data")
    broken = tmp_path / "data" / "train" / "class1" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    unseen = tmp_path / "data" / "val" / "class2" / "1.png"
    unseen.write_bytes(b"no picture")
    notes = []
    run(tmp_path / "data", tmp_path / "out", report=notes.append, recipe_of={"epochs": 1})
    said = [event["text"] for event in notes if event["event"] == "note"]
    assert len(said) == 2 and str(broken) in said[0] and str(unseen) in said[1]
    rows = list(csv.DictReader(open(tmp_path / "out" / "unreadable.csv")))
    assert {row["image"] for row in rows} == {str(broken), str(unseen)} and rows[0]["reason"]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["unreadable"] == 2 and result["images"] == 23


def test_nothing_but_unreadable_pictures(tmp_path):
    pictures(tmp_path / "data")
    for path in (tmp_path / "data" / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="^data: 10 images in a row are unreadable"):
            run(tmp_path / "data", tmp_path / "out", workers=workers)


@pytest.mark.slow
def test_names_that_are_no_text(tmp_path):
    """As old archives leave them."""
    pictures(tmp_path / "data")
    broken = tmp_path / "data" / "train" / "class1" / "3.png"
    broken.write_bytes(b"no picture")
    broken.rename(broken.with_name(os.fsdecode(b"\xff.png")))
    for _ in range(2):
        run(tmp_path / "data", tmp_path / "out", recipe_of={"epochs": 1})
    assert "\\udcff.png" in (tmp_path / "out" / "unreadable.csv").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"recipe_of": {"batch": 7}, "accum": 2}, "batch: 7, expected a multiple of 2"),
        ({"recipe_of": {"batch": 9}}, "batch: 9 images in each process, expected an even number"),
        (
            {"recipe_of": {"batch": 64}},
            "batch: 64, expected at most the 24 images that each of 1 proc",
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
def test_refused(change, message, data, tmp_path):
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
    pictures(tmp_path, splits=("train",))
    pictures(tmp_path, classes=4, splits=("val",))
    with pytest.raises(ValueError, match="class3"):
        run(tmp_path, tmp_path / "out")


def convnet(folder, classes=3):
    """A little teacher in a folder."""
    torch.manual_seed(seeded(0))
    model = timm.create_model("test_resnet", num_classes=classes)
    deit_fast.save_pretrained(model, folder)
    return folder


@pytest.mark.parametrize("distill", [slow("soft"), "hard"])
@pytest.mark.parametrize(
    "model, token", [slow("deit_tiny", "class"), ("deit_tiny_distilled", "distill")]
)
def test_distillation(distill, model, token, data, tmp_path):
    teacher = convnet(tmp_path / "teacher")
    out = tmp_path / "out"
    options = {"model": model, "distill": distill, "teacher": str(teacher)}
    events = []
    if (distill, token) in (("soft", "class"), ("hard", "distill")):
        start(data, out, **options)
        state = run(data, out, save_every=1, report=events.append, **options)
        assert same(state, run(data, tmp_path / "whole", **options))
    else:
        run(data, out, report=events.append, recipe_of={"epochs": 1}, **options)
    facts = json.loads((out / "run.json").read_text())
    assert facts["distill_token"] == token and facts["distill"] == distill
    assert facts["teacher_top1"] == events[0]["teacher_top1"] is not None
    heads = {"class", "distill", "joint", "joint_softmax"} if token == "distill" else {"class"}
    assert set(json.loads((out / "result.json").read_text())["top1"]) == heads


@pytest.mark.slow
def test_the_teacher_is_heard_by_the_distillation_head_alone(data, tmp_path):
    options = {"distill": "hard", "teacher": str(convnet(tmp_path / "teacher"))}
    recipe_of = {"hard_weight": 1.0, "opt": "sgd", "weight_decay": 0.0, "epochs": 1}
    first = run(data, tmp_path / "a", recipe_of=recipe_of | {"lr": 1e-30, "min_lr": 0.0}, **options)
    state = run(data, tmp_path / "b", recipe_of=recipe_of | {"warmup_epochs": 0}, **options)
    assert torch.equal(state["model"]["head.weight"], first["model"]["head.weight"])
    assert not torch.equal(state["model"]["head_dist.weight"], first["model"]["head_dist.weight"])


@pytest.mark.slow
def test_the_teacher_matters(data, tmp_path):
    """Its loss falls where its answers are learnt, and another teacher is another run."""
    options = {"distill": "hard", "teacher": str(convnet(tmp_path / "teacher"))}
    state = run(data, tmp_path / "out", recipe_of={"epochs": 1}, **options)
    alone = run(data, tmp_path / "alone", recipe_of={"epochs": 1})
    assert state["rows"][0]["loss"] != alone["rows"][0]["loss"]
    weights = tmp_path / "teacher" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="other settings: teacher"):
        run(data, tmp_path / "out", recipe_of={"epochs": 1}, **options)


@pytest.mark.slow
def test_a_teacher_of_other_classes(data, tmp_path):
    teacher = str(convnet(tmp_path / "teacher", classes=5))
    with pytest.raises(ValueError, match="has 5 classes, expected the data's 3"):
        run(data, tmp_path / "out", distill="hard", teacher=teacher)


def test_fine_tuning_at_another_resolution(data, whole, tmp_path):
    """The position embedding keeps its norms (bicubic, no antialiasing); bilinear's would shrink.
    The teacher, a transformer of a fixed size, is resized too."""
    state = run(
        data, tmp_path / "out", model=None, start=str(whole[0] / "model"), img_size=32,
        distill="hard",
        teacher=str(whole[0] / "model"),
        recipe_of={"epochs": 1, "lr": 1e-30, "warmup_lr": 0.0, "min_lr": 0.0},
    )  # fmt: skip
    new, old = state["model"]["pos_embed"], whole[1]["model"]["pos_embed"]
    assert new.shape[1] == 2 + 16 and old.shape[1] == 2 + 4
    assert torch.equal(new[:, :2], old[:, :2])

    def norm(pos_embed):
        return pos_embed[:, 2:].norm(dim=2).mean().item()

    grid = old[:, 2:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    bilinear = torch.nn.functional.interpolate(grid, (4, 4), mode="bilinear")
    assert bilinear.flatten(2).norm(dim=1).mean().item() < 0.9 * norm(old)
    assert_within(norm(new), norm(old), 0.1, "norms that bicubic keeps")


def test_another_number_of_classes(whole, tmp_path):
    pictures(tmp_path / "data", classes=2)
    with pytest.warns(UserWarning, match="head"):
        state = run(
            tmp_path / "data", tmp_path / "out", model=None, start=str(whole[0] / "model"),
            recipe_of={"epochs": 1},
        )  # fmt: skip
    assert state["model"]["head.weight"].shape[0] == 2


def test_weights_of_another_model(data, whole, tmp_path):
    with pytest.raises(
        ValueError, match="holds a deit_tiny_distilled_patch16_224, expected deit_tiny"
    ):
        run(data, tmp_path, model="deit_tiny", start=str(whole[0] / "model"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit"):
        run(data, tmp_path / "out", start=str(tmp_path / "other.pth"))


def test_a_run_is_not_known_by_the_names_of_files(whole):
    """They may change, and runs of older versions go on."""
    known = whole[1]["identity"]["settings"].keys()
    assert not known & {"data", "start_key", "teacher_checkpoint", "teacher_checkpoint_key"}


def test_a_start_that_is_not_there(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="start: nowhere is no folder or file"):
        run(data, tmp_path, start="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no folder of weights"):
        run(data, tmp_path, model=None, start=str(tmp_path / "empty"))


@pytest.mark.slow
def test_convnets_are_trained_on(data, tmp_path):
    """With the arguments of their start, which old versions of timm do not remember."""
    args = {"model": "resnet18", "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}}
    plain = {"recipe_of": {"epochs": 1, "drop": 0.0}}
    run(data, tmp_path / "first", img_size=32, **args, **plain)
    model = str(tmp_path / "first" / "model")
    state = run(data, tmp_path / "second", model=None, start=model, img_size=32, **plain)
    again = deit_fast.from_pretrained(tmp_path / "second" / "model", strict=False)
    assert same(dict(again.state_dict()), dict(state["model"]))
    # other weights in the same place are another run, the same ones elsewhere are not
    (tmp_path / "moved").mkdir()
    for path in (tmp_path / "first" / "model").iterdir():
        path.rename(tmp_path / "moved" / path.name)
    run(data, tmp_path / "second", model=None, start=str(tmp_path / "moved"), img_size=32, **plain)
    run(data, tmp_path / "third", img_size=32, seed=1, **args, **plain)
    other = str(tmp_path / "third" / "model")
    with pytest.raises(ValueError, match="other settings: start"):
        run(data, tmp_path / "second", model=None, start=other, img_size=32, **plain)


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


@pytest.mark.parametrize("amp", ["bf16", slow("fp16")])
def test_mixed_precision_goes_on_bit_for_bit(amp, data, tmp_path):
    start(data, tmp_path / "out", amp=amp)
    state = run(data, tmp_path / "out", amp=amp, save_every=1)
    assert same(state, run(data, tmp_path / "whole", amp=amp))
    assert (amp == "fp16") == bool(state["scaler"])
    assert all(math.isfinite(row["loss"]) for row in state["rows"])


@pytest.mark.slow
def test_torchrun(data, tmp_path):
    """Two processes: the same images an update as one, the same numbers to evaluate. By SGD, as in
    test_parts_of_a_batch_add_up."""
    common = ["-m", "deit_fast", "train", str(data), "--workers", "0"]
    common += options_of(**{"drop-path": 0, "mixup-prob": 0, "opt": "sgd", "lr": 0.05})
    assert main([*common[2:], "--out", str(tmp_path / "one")]) == 0
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*ranks, *common, "--out", str(tmp_path / "two")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    one, two = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert two["rows"][-1]["scores"]["images"] == 24
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert_within(b["loss"], a["loss"], APART[FP32])
    for name, tensor in one["model"].items():
        assert_close(two["model"][name], tensor, name)
    assert json.loads((tmp_path / "two" / "settings.json").read_text())["processes"] == 2


TINY_VIT = {  # a stage of each kind
    "embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 1), "window_sizes": (7, 2),
}  # fmt: skip


def test_tiny_vit_by_its_recipes(data, tmp_path):
    """Distilled from labels here, then tuned: statistics frozen, and another number of classes."""
    tiny = {"model": "tiny_vit_5m_224", "model_args": TINY_VIT, "img_size": 16}
    less = {"epochs": 2, "batch": 8, "warmup_epochs": 1, "lr_batch": 0}
    first = run(data, tmp_path / "22k", recipe_of=less, recipe_name="tinyvit-22k", **tiny)
    moved = [k for k, v in first["model"].items() if k.endswith("running_mean") and v.any()]
    assert len(moved) == 9
    other = pictures(tmp_path / "other", classes=2, size=16)
    tiny |= {"start": str(tmp_path / "22k" / "model"), "model": None, "model_args": None}
    tuned = run(other, tmp_path / "1k", recipe_of=less, recipe_name="tinyvit-22k-1k", **tiny)
    assert tuned["model"]["head.fc.weight"].shape == (2, 32)
    for name, value in first["model"].items():
        if "running" in name:
            assert torch.equal(tuned["model"][name], value), name
    learnt = "stages.1.blocks.0.attn.attention_biases"
    assert not torch.equal(tuned["model"][learnt], first["model"][learnt])


def test_groups_of_parameters():
    """TinyViT's attention biases do not decay, nor do norms and biases; the first layer's lr is the
    least."""
    model = create_model("tiny_vit_5m_224", num_classes=5, **TINY_VIT)
    names = {id(p): name for name, p in model.named_parameters()}
    plain, fine = (recipe.load(name) for name in ("tinyvit-22k", "tinyvit-22k-1k"))
    for of in (plain, fine):
        groups = parameter_groups(of, model)
        decayed = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
        assert decayed.keys() == set(names.values())
        for name, decay in decayed.items():
            matrix = model.get_parameter(name).dim() > 1 and "attention_biases" not in name
            assert decay == (of.weight_decay if matrix else 0), name
    scales = {
        names[id(p)]: group["lr_scale"] for group in parameter_groups(fine, model)
        for p in group["params"]
    }  # fmt: skip
    assert scales["head.fc.weight"] == 1
    assert scales["patch_embed.conv1.conv.weight"] == min(scales.values()) < 0.52
    (block,) = {v for k, v in scales.items() if k.startswith("stages.1.blocks.0")}
    (before,) = {v for k, v in scales.items() if k.startswith("stages.0.blocks.0")}
    assert before < block < 1
    vit = create_model("deit_tiny", depth=1)
    kept = [g["params"] for g in parameter_groups(plain, vit) if not g["weight_decay"]]
    assert {id(vit.cls_token), id(vit.pos_embed), id(vit.norm.weight)} <= set(
        map(id, sum(kept, []))
    )


def test_the_schedule_goes_by_updates(data, tmp_path, monkeypatch):
    """Warm-up is a line from update to update, not a step from epoch to epoch."""
    step, rates = Run._step, []

    def spy(self, *args):
        done = step(self, *args)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return done

    monkeypatch.setattr(Run, "_step", spy)
    warm = {"epochs": 2, "warmup_epochs": 1, "warmup_lr": 0.0, "sched_on_updates": True}
    run(data, tmp_path, recipe_of=warm)
    first = rates[: len(rates) // 2]
    assert len(first) > 2
    assert first == pytest.approx([first[1] * i for i in range(len(first))]) and first[1] > 0
