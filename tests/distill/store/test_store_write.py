"""What `write` puts into a soft-label store, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import FP16, assert_close
from small_runs import image_folders
from small_stores import BLOCK, DEIT, epoch_files, train_from_store, write_module, write_store

from deit_fast.distill import augment, teacher
from deit_fast.distill.datasets import open_images
from deit_fast.distill.store import Store, check, views
from deit_fast.distill.store.views import Views


def test_what_is_stored_is_what_the_teacher_says(data, net, whole):
    """By hand: augmented, mixed in pairs, softmax, the largest first."""
    store = Store(whole)
    model = teacher.load_teacher(net, 3, 16)
    images = open_images(data, "train")
    config = {k: store.manifest.transform[k] for k in ("input_size", "mean", "std")}
    change = augment.transform_of(DEIT, config)
    records = store.epoch(1).all()
    batch = []
    for record in records[:6]:
        augment.reseed(int(record["seed"]))
        batch.append(change(images.image(int(record["index"]))))
    mixed = 0
    for i in (0, 2, 4):
        augment.reseed(int(records[i]["seed"]) ^ int(records[i + 1]["seed"]))
        cutmix = np.random.rand(1) < 0.5
        lam = np.where(cutmix, np.random.beta(1.0, 1.0, 1), np.random.beta(0.8, 0.8, 1))
        np.random.rand(1)  # below mixup_prob 1
        if not cutmix[0]:
            a, b, share = batch[i], batch[i + 1], np.float32(lam[0])
            batch[i], batch[i + 1] = a * share + b * (1 - share), b * share + a * (1 - share)
            mixed += 1
        else:
            batch[i] = batch[i + 1] = None
    assert mixed  # CutMix is left to the test of bits
    made = Views(images, DEIT, config)
    stacked, *_ = made.collate([made[int(r["index"]), int(r["seed"])] for r in records[:6]])
    for x, y in zip(batch, stacked, strict=True):
        assert x is None or torch.equal(x, y)
    with torch.no_grad():
        expected = model(stacked).softmax(1).sort(descending=True)
    assert np.array_equal(records["classes"][:6], expected.indices[:, :2].numpy())
    probs = torch.from_numpy(records["probs"][:6].copy())
    assert_close(probs.float(), expected.values[:, :2], dtype=FP16)
    assert (records["probs"][:, 0] >= records["probs"][:, 1]).all()
    assert len(np.unique(records["classes"][:, 0])) > 1


def test_the_size_is_known_before(data, net, tmp_path, monkeypatch):
    events = []
    found = write_store(data, tmp_path / "a", net, report=events.append)
    (begin,) = (event for event in events if event["event"] == "begin")
    size = sum(len(content) for content in epoch_files(tmp_path / "a").values())
    assert begin["bytes"] == found["bytes"] == size == 3 * (64 + 24 * 16 + 16)
    assert found["records"] == 24 and found["images_per_s"] > 0 and not found["unreadable"]
    usage = type("Usage", (), {"free": size - 1})
    monkeypatch.setattr(write_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=f"{size - 1:,} bytes free, the store needs {size:,} more"):
        write_store(data, tmp_path / "b", net)
    again = write_store(data, tmp_path / "a", net)  # needs nothing more
    assert again["bytes"] == size and again["images_per_s"] is None


@pytest.mark.parametrize("workers", [0, 2])
def test_more_epochs_and_other_workers_make_the_same_files(workers, data, net, whole, tmp_path):
    write_store(data, tmp_path, net, epochs=1, workers=workers)
    write_store(data, tmp_path, net, workers=workers)
    assert epoch_files(tmp_path) == epoch_files(whole)
    with pytest.raises(ValueError, match="epochs: 2, but .* is to get 3"):
        write_store(data, tmp_path, net, epochs=2)


@pytest.mark.slow
def test_a_part_of_the_images(data, net, tmp_path):
    """Evenly of each class; an odd one at the end is not mixed, and not trained on."""
    write_store(data, tmp_path / "s", net, count=15, epochs=1)
    records = Store(tmp_path / "s").epoch(0)
    labels = open_images(data, "train").labels[records.all()["index"]]
    assert np.bincount(labels).tolist() == [5, 5, 5] and len(set(records.all()["index"])) == 15
    state = train_from_store(
        data, tmp_path / "o", tmp_path / "s", recipe_of={"epochs": 1, "batch": 14}
    )
    assert state["rows"][0]["epoch"] == 1
    with pytest.raises(ValueError, match="batch: 16, expected at most the 14 images"):
        train_from_store(data, tmp_path / "p", tmp_path / "s", recipe_of={"epochs": 1, "batch": 16})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k: 0, expected 1 to 3, which is how many classes"),
        ({"k": 4}, "k: 4, expected 1 to 3"),
        ({"epochs": 0}, "epochs: 0, expected 1 or more"),
        ({"batch": 7}, "batch: 7, expected an even number"),
        ({"batch": 0}, "batch: 0, expected 2 or more"),
        ({"workers": -1}, "workers: -1, expected 0 or more"),
        ({"amp": "fp8"}, "amp: 'fp8', expected one of none, bf16, fp16"),
        ({"seed": -1}, "seed: -1, expected 0 to"),
        ({"count": 25}, "count: 25, expected 1 to 24"),
    ],
)
def test_refused_by_write(change, message, data, net, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_store(data, tmp_path / "s", net, **change)
    assert not (tmp_path / "s").exists()


def test_a_probability_that_is_not_finite(data, net, tmp_path, monkeypatch):
    load = write_module.load_teacher

    def spoilt(*args):
        model = load(*args)
        model.fc.weight.data[0] = torch.inf
        return model

    monkeypatch.setattr(write_module, "load_teacher", spoilt)
    with pytest.raises(FloatingPointError, match="teacher: its output is not finite"):
        write_store(data, tmp_path, net)


@pytest.mark.slow
def test_unreadable_images_give_way_and_records_say_to_which(net, tmp_path):
    data = image_folders(tmp_path / "data")
    broken = data / "train" / "class1" / "3.png"
    broken.write_bytes(b"no image")
    found = write_store(data, tmp_path / "s", net)
    assert list(found["unreadable"]) == [str(broken)]
    drawn = Store(tmp_path / "s").epoch(0).all()["index"].tolist()
    assert sorted(drawn) == sorted([*range(11), *range(12, 24), 12])
    events = []
    train_from_store(
        data, tmp_path / "o", tmp_path / "s", recipe_of={"epochs": 1}, report=events.append
    )
    assert not [event for event in events if event["event"] == "note"]  # it is not looked at
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="^data: 10 images in a row are unreadable"):
        write_store(data, tmp_path / "t", net)


def test_an_image_that_broke_after_the_teacher_saw_it(data, net, whole, tmp_path, monkeypatch):
    changed = Path(shutil.copytree(data, tmp_path / "data"))
    broken = changed / "train" / "class1" / "3.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"an image is unreadable: .*1/3.png: .*the teacher saw"):
        train_from_store(changed, tmp_path / "o", whole)
    # and where it is not one of the sample
    monkeypatch.setattr(views, "SAMPLED", 2)
    write_store(data, tmp_path / "s", net)
    place = Store(tmp_path / "s").epoch(0).all()["index"].tolist().index(11)
    named = rf"^data: an image is unreadable: .*1/3.png: .* record {place} of .*h-0000-.*records"
    with pytest.raises(ValueError, match=named):
        train_from_store(changed, tmp_path / "o", tmp_path / "s", recipe_of={"epochs": 1})
    with pytest.raises(ValueError, match=r"1/3.png: .* record \d+ of .*records"):
        check(changed, tmp_path / "s", net)


@pytest.mark.slow
def test_an_image_that_was_repaired_after_the_teacher_missed_it(data, net, tmp_path):
    """It stays out of what is written, and the writer goes on with what it began."""
    changed, out = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "s"
    broken = changed / "train" / "class1" / "3.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no image")
    write_store(changed, out, net, epochs=2)
    path = out / "epoch-0001-rank-0-of-1.records"
    first = Store(out).epoch(0).all()["index"].tolist()
    was = path.read_bytes()
    path.unlink()
    path.with_suffix(".part").write_bytes(was[: 64 + 3 * BLOCK])
    broken.write_bytes(content)
    assert check(changed, out, net)["mean_difference"] == 0
    write_store(changed, out, net, epochs=2)
    assert path.read_bytes()[: 64 + 3 * BLOCK] == was[: 64 + 3 * BLOCK]
    assert Store(out).epoch(0).all()["index"].tolist() == first and 11 not in first
    assert check(changed, out, net)["mean_difference"] == 0
    train_from_store(changed, tmp_path / "o", out, recipe_of={"epochs": 2})
