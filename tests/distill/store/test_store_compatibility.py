"""Stores of another teacher, data set, recipe or other pixels are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import image_folders, run, small_teacher
from small_stores import epoch_files, train_from_store, write_module, write_store

from deit_fast.distill import recipe
from deit_fast.distill.store import check, compatibility, views


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"k": 3}, "k 2, now 3"),
        ({"batch": 8}, "batch 6, now 8"),
        ({"amp": "bf16"}, "amp 'none', now 'bf16'"),
        ({"count": 12}, "records 24, now 12"),
        ({"img_size": 32}, r"transform input_size \[3, 16, 16\], now \[3, 32, 32\]"),
        ({"of": recipe.load("deit", hflip=0.0)}, "transform hflip 0.5, now 0.0"),
        ({"of": recipe.load("deit", cutmix=0)}, "transform cutmix 1.0, now 0.0"),
    ],
)
def test_a_store_of_something_else_is_not_gone_on_with(change, named, data, net, copy):
    before = epoch_files(copy)
    with pytest.raises(ValueError, match=f"out: .* is another store: .*{named}"):
        write_store(data, copy, net, **change)
    assert epoch_files(copy) == before


def test_another_teacher(data, net, copy, tmp_path):
    other = small_teacher(tmp_path / "net", seed=1)
    with pytest.raises(ValueError, match="is another store: teacher weights '.*', now"):
        write_store(data, copy, other)
    with pytest.raises(ValueError, match="teacher: .*/net is .*, expected that of .*copy"):
        check(data, copy, other)
    write_store(data, copy, shutil.copytree(net, tmp_path / "moved"))  # the same, elsewhere


@pytest.mark.slow
def test_another_data_set(data, net, copy, tmp_path):
    def refused(changed, what):
        with pytest.raises(ValueError, match=f"is another store: images {what}"):
            write_store(changed, copy, net)
        with pytest.raises(ValueError, match=f"is of another data: .*{what}"):
            train_from_store(changed, tmp_path / "o", copy)
        with pytest.raises(ValueError, match=f"is of another data: .*{what}"):
            check(changed, copy, net)

    refused(image_folders(tmp_path / "more", each=9), "count 24, now 27")
    named = Path(shutil.copytree(data, tmp_path / "named"))
    (named / "train/class1/3.png").rename(named / "train/class1/9.png")
    refused(named, "names")
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    write_store(moved, copy, net)  # the same, elsewhere
    (moved / "train/class1/3.png").rename(moved / "train/class2/x.png")
    refused(moved, "labels")


@pytest.mark.slow
def test_other_pixels_and_other_versions(data, net, copy, tmp_path, monkeypatch):
    """Versions that make the same pixels are noted, those that make others refused."""
    real = views.versions()
    for where in (write_module, compatibility):
        monkeypatch.setattr(where, "versions", lambda: real | {"PIL": "99"})
    notes = []
    train_from_store(data, tmp_path / "a", copy, recipe_of={"epochs": 1}, report=notes.append)
    (note,) = (event["text"] for event in notes if event["event"] == "note")
    assert f"PIL {real['PIL']}, now 99; sample views are the same" in note
    notes = []
    assert check(data, copy, net, report=notes.append)["mean_difference"] == 0
    assert [event["text"] for event in notes] == [note]
    notes = []
    write_store(data, copy, net, epochs=4, report=notes.append)
    assert [event["text"] for event in notes if event["event"] == "note"] == [note]
    changed = Path(shutil.copytree(data, tmp_path / "changed"))
    first = changed / "train/class0/0.png"
    pixels = np.asarray(Image.open(first)).copy()
    pixels[2:14, 2:14] ^= 1
    Image.fromarray(pixels).save(first)
    for call in (
        lambda: train_from_store(changed, tmp_path / "b", copy),
        lambda: check(changed, copy, net),
        lambda: write_store(changed, copy, net),
    ):
        with pytest.raises(ValueError, match="not, bit for bit.* .PIL .*, now 99"):
            call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_size": 32}, "img_size: 32, but the images of .* have 16"),
        ({"mean": (0.1, 0.2, 0.3)}, r"mean: \(0.1, 0.2, 0.3\), but"),
        ({"count": 4}, "count: 4, but the images are those of"),
        ({"distill": "hard", "teacher": "x"}, "distill: 'hard' with a store, expected 'none'"),
        ({"model_args": {"in_chans": 1}}, "mean: .* expected 1 numbers"),
        ({"recipe_of": {"erasing": 0.0}}, "is of another transform: erasing 0.25, now 0.0"),
        (
            {"recipe_of": {"repeated_aug": 3}},
            "repeated_aug: 3, expected 1: an epoch of .* each image",
        ),
        (
            {"recipe_of": {"batch": 9}},
            "batch: 9 images on each rank, expected an even number for",
        ),
        ({"recipe_of": {"epochs": 4}}, "epochs: 4, but .* has 3 that can be used"),
        ({"recipe_of": {"batch": 26}}, "batch: 26, expected at most the 24 images"),
        ({"store": "nowhere"}, "nowhere has no manifest.json"),
    ],
)
def test_refused_by_train(change, message, data, whole, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(data, tmp_path, **{"img_size": None, "store": str(whole)} | change)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.slow
def test_another_store_is_another_run(data, net, whole, tmp_path):
    train_from_store(data, tmp_path / "o", whole, recipe_of={"epochs": 1})
    write_store(data, tmp_path / "s", net, k=1)
    with pytest.raises(ValueError, match="other settings: store {'key': .*, now {'key'"):
        train_from_store(data, tmp_path / "o", tmp_path / "s", recipe_of={"epochs": 1})
    train_from_store(
        data, tmp_path / "o", shutil.copytree(whole, tmp_path / "moved"), recipe_of={"epochs": 1}
    )
