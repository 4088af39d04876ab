"""Labelled images of every kind: the same for all of them, and their splits."""

import pickle

import numpy as np
import pytest
import selection
import torch
from checking import seeded
from small_datasets import (
    CLASSES,
    COLOUR,
    COLOURED,
    GRAY,
    KINDS,
    LABELS,
    NAMED,
    as_folders,
    as_saved,
    as_webdataset,
    each,
    fails,
    idx,
    pixels,
    png,
    table,
    tar,
)
from torch.utils.data import DataLoader, Dataset

from deit_fast.distill.datasets import open_images
from deit_fast.images import Unreadable


@each(*KINDS)
def test_every_kind_gives_the_same(kind, tmp_path):
    path = KINDS[kind](tmp_path / "data", GRAY)
    images = open_images(path, mode="L")
    assert images.classes == CLASSES and len(images) == len(GRAY) and images.mode == "L"
    assert images.labels.dtype == np.int64
    np.testing.assert_array_equal(images.labels, LABELS)
    np.testing.assert_array_equal(pixels(images), GRAY)
    assert images.name(7).startswith(str(path)) and "7" in images.name(7)
    again = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(pixels(again), GRAY)
    assert again.classes == CLASSES and again.name(7) == images.name(7)
    rgb = open_images(path).image(3)
    assert rgb.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(rgb), np.repeat(GRAY[3][..., None], 3, 2))


@each(*COLOURED)
def test_colour_and_any_order(kind, tmp_path):
    images = open_images(KINDS[kind](tmp_path / "data", COLOUR))
    for i in np.random.default_rng(seeded(2)).permutation(len(images)):
        np.testing.assert_array_equal(np.asarray(images.image(i)), COLOUR[i])


@each("folders", "table", "tar of folders", "saved")
def test_named_classes(kind, tmp_path):
    path = KINDS[kind](tmp_path / "data", COLOUR, NAMED)
    images = open_images(path)
    assert images.classes == NAMED
    np.testing.assert_array_equal(images.labels, LABELS)
    turned = open_images(path, classes=NAMED[::-1])
    assert turned.classes == NAMED[::-1]
    np.testing.assert_array_equal(turned.labels, 10 - LABELS)
    np.testing.assert_array_equal(pixels(turned), pixels(images))
    fails(path, "missing yak", "extra Bee, gnu", classes=[*set(NAMED) - {"Bee", "gnu"}, "yak"])
    fails(path, "missing nothing", "extra fly", classes=[c for c in NAMED if c != "fly"])


@each("webdataset, cls", "parquet", "idx")
def test_numbered_classes(kind, tmp_path):
    path = KINDS[kind](tmp_path / "data", GRAY)
    images = open_images(path, classes=[*NAMED, "more"])
    assert images.classes == [*NAMED, "more"]
    np.testing.assert_array_equal(images.labels, LABELS)
    said = fails(path, "label 10", "there are 10", classes=NAMED[:10])
    assert open_images(path).name(22) in said


def test_splits_by_folder(tmp_path):
    as_folders(tmp_path / "train", GRAY)
    assert len(open_images(tmp_path, "train")) == 24
    fails(tmp_path, "'validation'", "val, validation, valid, test", "is train", split="validation")
    as_folders(tmp_path / "test", COLOUR)
    as_webdataset(tmp_path / "valid", COLOUR[:17], "cls")
    assert len(open_images(tmp_path, "validation")) == 17  # before test
    as_webdataset(tmp_path / "val", COLOUR[:19], "cls")
    assert len(open_images(tmp_path, "validation")) == 19
    tar(tmp_path / "leftover.tar", {})
    assert len(open_images(tmp_path, "train")) == 24
    fails(tmp_path, "more than one way", "leftover.tar", "train")
    tar(tmp_path / "train-0.tar", {})
    fails(tmp_path, "could be train-0.tar and train", split="train")


def test_splits_by_file(tmp_path):
    shards, mnist = tmp_path / "tar", tmp_path / "idx"
    for count, word in ((3, "train"), (2, "validation"), (1, "test")):
        samples = {f"{i}.png": png(GRAY[i]) for i in range(count)}
        samples |= {f"{i}.cls": b"0" for i in range(count)}
        tar(shards / f"imagenet-{word}-0000.tar", samples)
    for count, word in ((3, "train"), (2, "t10k")):
        idx(mnist / f"{word}-images.idx3-ubyte", GRAY[:count])
        idx(mnist / f"{word}-labels.idx1-ubyte", np.zeros(count))
    for path in (shards, mnist):
        assert len(open_images(path, "train")) == 3
        assert len(open_images(path, "validation")) == 2
        fails(path, "say which", "train")
    assert len(open_images(shards / "imagenet-test-0000.tar")) == 1
    assert len(open_images(mnist / "t10k-images.idx3-ubyte")) == 2
    fails(shards / "imagenet-test-0000.tar", "'train'", "one file", split="train")


@pytest.mark.slow
def test_splits_by_parquet_file(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    for count, word in ((3, "train"), (2, "validation"), (1, "test")):
        some = table(GRAY[:count], labels=[0] * count)
        some.to_parquet(path / f"{word}-00000-of-00001.parquet")
    assert len(open_images(path, "train")) == 3
    assert len(open_images(path, "validation")) == 2
    fails(path, "say which", "train")
    assert len(open_images(path / "test-00000-of-00001.parquet")) == 1


@pytest.mark.slow
def test_splits_of_save_to_disk(tmp_path):
    selection.extra("train", "datasets")
    import datasets

    both = {"train": table(GRAY), "test": table(GRAY[:9], labels=LABELS[:9])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "data")
    assert len(open_images(tmp_path / "data", "train")) == 24
    assert len(open_images(tmp_path / "data", "validation")) == 9
    fails(tmp_path / "data", "say which", "test, train")
    fails(tmp_path / "data" / "test", "no split 'train'", split="train")
    as_saved(tmp_path / "folders" / "val", COLOUR[:19], labels=LABELS[:19])
    assert len(open_images(tmp_path / "folders", "validation")) == 19


def test_nothing_there(tmp_path):
    fails(tmp_path / "none", "no such file or folder", error=FileNotFoundError)
    fails(tmp_path, "nothing recognised", ".parquet", "there is nothing")
    (tmp_path / "images.zip").write_bytes(b"")
    fails(tmp_path, "nothing recognised", "images.zip")
    fails(tmp_path / "images.zip", "nothing recognised")
    (tmp_path / "cat").mkdir()
    fails(tmp_path, "no image in cat")
    fails(tar(tmp_path / "empty.tar", {"cat": None}), "no image in empty.tar")
    with pytest.raises(ValueError, match="mode: 'RGBA'"):
        open_images(tmp_path, mode="RGBA")
    with pytest.raises(ValueError, match="split: 'val'"):
        open_images(tmp_path, "val")


class Pixels(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(np.array(self.images.image(i)))


@each("webdataset, cls", "saved")
def test_workers_read_the_same(kind, tmp_path):
    images = open_images(KINDS[kind](tmp_path / "data", COLOUR))
    images.image(0)  # opens a file, which the workers then inherit
    rounds = DataLoader(Pixels(images), sampler=[*range(24)] * 20, batch_size=8, num_workers=2)
    for number, batch in enumerate(rounds):
        first = number * 8 % 24
        np.testing.assert_array_equal(batch, COLOUR[first : first + 8])


@each("folders", "tar", "saved")
def test_unreadable(kind, tmp_path):
    noise = np.random.default_rng(seeded(0)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    contents = [png(noise), b"no image", b"", png(noise)[:5000]]
    data = tmp_path / "data"
    if kind == "folders":
        (data / "a").mkdir(parents=True)
        for i, content in enumerate(contents):
            (data / "a" / f"{i}.png").write_bytes(content)
    elif kind == "tar":
        data = tar(tmp_path / "a.tar", {f"a/{i}.png": c for i, c in enumerate(contents)})
    else:
        as_saved(data, contents, labels=[0] * 4)
    images = open_images(data)
    np.testing.assert_array_equal(np.asarray(images.image(0)), noise)
    for i, why in ((1, "cannot identify"), (2, "cannot identify"), (3, "truncated")):
        with pytest.raises(Unreadable, match=why) as error:
            images.image(i)
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    if kind == "folders":
        (data / "a" / "0.png").unlink()
        with pytest.raises(Unreadable, match="no such file"):
            images.image(0)
