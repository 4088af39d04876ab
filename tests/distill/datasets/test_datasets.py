"""Labelled images from folders, tar files, Hugging Face datasets and IDX files."""

import gzip
import io
import json
import os
import pickle
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import selection
import torch
from checking import seeded
from PIL import Image
from timm.data.readers import create_reader
from torch.utils.data import DataLoader, Dataset

from deit_fast.distill.datasets import fraction, open_images
from deit_fast.distill.datasets.tars import OPEN_FILES, TarImages
from deit_fast.images import Unreadable

CLASSES = [str(c) for c in range(11)]  # "10" comes after "9" in natural order alone
LABELS = np.sort(np.arange(24) % 11)
GRAY = np.random.default_rng(seeded(0)).integers(0, 256, (24, 5, 6), dtype=np.uint8)
COLOUR = np.random.default_rng(seeded(1)).integers(0, 256, (24, 5, 6, 3), dtype=np.uint8)
FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tar(path, members, **options):
    """members: {name: bytes, or None for a folder}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as made:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            made.addfile(info, io.BytesIO(content or b""))
    return path


def idx(path, array, magic=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = (magic or bytes((0, 0, 8, array.ndim))) + sizes + array.astype(np.uint8).tobytes()
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(content)
    return path


def as_folders(path, pixels, classes=CLASSES):
    for i, (one, label) in enumerate(zip(pixels, LABELS, strict=True)):
        (path / classes[label]).mkdir(parents=True, exist_ok=True)
        (path / classes[label] / f"{i}.PNG").write_bytes(png(one))
    return path


def as_tar_of_folders(path, pixels, classes=CLASSES):
    members = {"./top": None} | {f"./top/{name}": None for name in classes}
    for i, (one, label) in enumerate(zip(pixels, LABELS, strict=True)):
        members[f"./top/{classes[label]}/{i}.a.png"] = png(one)
    return tar(path / "images.tar", members)


def as_webdataset(path, pixels, suffix):
    for first in (0, 16):  # two shards
        members = {"._junk.png": b"", "info.txt": b"?"}
        for i in range(first, min(first + 16, len(pixels))):
            label = int(LABELS[i])
            content = str(label) if suffix == "cls" else json.dumps({"label": label, "id": i})
            members |= {f"a.b/{i}.{suffix}": content.encode(), f"a.b/{i}.x.png": png(pixels[i])}
        tar(path / f"shard-{first}.tar", members)
    return path


def as_idx(path, pixels, suffix=""):
    idx(path / f"train-images-idx3-ubyte{suffix}", pixels)
    idx(path / f"train-labels-idx1-ubyte{suffix}", LABELS)
    return path


def table(pixels, label=None, labels=LABELS, keys=("image", "label")):
    selection.extra("train", "datasets")
    import datasets

    rows = [{"bytes": one if isinstance(one, bytes) else png(one), "path": None} for one in pixels]
    features = {keys[0]: datasets.Image(), keys[1]: label or datasets.Value("int32")}
    content = {keys[0]: rows, keys[1]: list(labels)}
    return datasets.Dataset.from_dict(content, datasets.Features(features))


def as_saved(path, pixels, names=CLASSES, **options):
    selection.extra("train", "datasets")
    import datasets

    table(pixels, datasets.ClassLabel(names=names), **options).save_to_disk(path)
    return path


def as_parquet(path, pixels, **options):
    path.mkdir(parents=True, exist_ok=True)
    made = table(pixels, **options)
    made.select(range(10)).to_parquet(path / "train-00000-of-00002.parquet")
    made.select(range(10, len(made))).to_parquet(path / "train-00001-of-00002.parquet")
    return path


KINDS = {
    "folders": as_folders,
    "tar of folders": as_tar_of_folders,
    "webdataset, cls": lambda path, pixels: as_webdataset(path, pixels, "cls"),
    "webdataset, json": lambda path, pixels: as_webdataset(path, pixels, "json"),
    "saved": as_saved,
    "parquet": as_parquet,
    "idx": as_idx,
    "idx, gzip": lambda path, pixels: as_idx(path, pixels, ".gz"),
}
COLOURED = [kind for kind in KINDS if "idx" not in kind]
EXTRA = ("saved", "parquet")  # written by an extra's package


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    if find_spec("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def each(*kinds):
    marked = [pytest.param(k, marks=pytest.mark.slow if k in EXTRA else ()) for k in kinds]
    return pytest.mark.parametrize("kind", marked)


def pixels(images):
    return np.stack([np.asarray(images.image(i)) for i in range(len(images))])


def fails(path, *expected, split=None, error=ValueError, **options):
    """Opening must fail, in one line that has the path and every wanted part."""
    with pytest.raises(error) as raised:
        open_images(path, split, **options)
    said = str(raised.value)
    assert said.startswith(f"data {path}"), said
    assert all(part in said for part in expected), said
    return said


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


NAMED = ["ant", "Bee", "bee", "bee2", "bee10", "cat", "dog", "eel", "fly", "gnu", "hen"]


@each("folders", "tar of folders", "saved")
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


def test_folders_are_timms(tmp_path):
    path = as_folders(tmp_path, COLOUR, [f"n{c}" for c in (7, 30, 200, *range(1000, 1008))])
    reader = create_reader("", root=str(path))
    images = open_images(path)
    assert images.classes == sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    names = [images.name(i) for i in range(len(images))]
    assert list(zip(names, images.labels, strict=True)) == reader.samples


def test_folders_errors(tmp_path):
    path = as_folders(tmp_path / "data", GRAY)
    (path / "3" / "notes.txt").write_text("")
    (path / ".cache" / "x").mkdir(parents=True)
    (path / ".cache" / "x" / "1.png").write_bytes(png(GRAY[0]))
    Image.new("L", (3, 2)).save(path / "9" / "more.webp")  # not among timm's suffixes
    assert len(open_images(path)) == 25
    (path / "4").rename(path / "11")
    fails(path, "no 4")
    (path / "11").rename(path / "4")
    (path / "12").mkdir()
    (path / "12" / "notes.txt").write_text("")
    fails(path, "no image in the folder of the class 12")
    (path / "12" / "deep").mkdir()
    (path / "12" / "deep" / "1.png").write_bytes(b"")
    fails(path, os.path.join("12", "deep", "1.png"), "CLASS/NAME")
    (path / "loose.jpg").write_bytes(b"")
    (path / "12" / "deep" / "1.png").unlink()
    fails(path, "loose.jpg", "CLASS/NAME")


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


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_tar_never_opens(format, tmp_path):
    long = "é" * 120  # needs headers of more than one block
    members = {f"{c}/{long}{c}.png": png(COLOUR[c]) for c in range(3)}
    path = tar(tmp_path / "a.tar", members, format=format)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(whole[: end + 512])
    assert len(open_images(path)) == 3
    for size in {*range(0, end + 1, 128), *range(1, end, 509)}:
        path.write_bytes(whole[:size])
        fails(path, "no whole uncompressed tar file")
    path.write_bytes(whole + whole)
    fails(path, "something else follows its end")
    path.write_bytes(gzip.compress(whole))
    fails(path, "no whole uncompressed tar file")


A = png(GRAY[0])


@pytest.mark.parametrize(
    "members, expected",
    [
        ({"1.png": A, "1.cls": b"0", "2.png": A}, "2: no label, expected 2.cls or 2.json"),
        ({"1.png": A, "1.cls": b"cat"}, "1: no label, expected an integer in its .cls"),
        (
            {"1.png": A, "1.json": b'{"id": 3}'},
            "1: no label, expected an integer in its .json under",
        ),
        ({"1.png": A, "1.json": b'{"label": true}'}, "1: no label, expected an integer"),
        ({"1.png": A, "1.json": b'{"label": '}, "1: no label, expected an integer"),
        ({"1.png": A, "1.cls": b"0", "1.x.png": A}, "1: two images in one sample"),
        ({"1.png": A, "1.cls": b"0", "2.cls": b"0"}, "2: a label without an image"),
        ({"1.png": A, "1.cls": b"-1"}, "1.png: label -1"),
        ({"cat/1.png": A, "2.png": A}, "2.png: no label, expected CLASS/NAME"),
        ({"./1.png": A}, " 1.png: no label, expected CLASS/NAME"),
        ({"train/cat/1.png": A, "val/cat/2.png": A}, "val/cat/2.png: no label"),
        ({"cat/1.png": A, "dog": None}, "no image in the folder of the class dog"),
        ({"0/1.png": A, "2/1.png": A}, "there is no 1"),
    ],
)
def test_tar_errors(members, expected, tmp_path):
    fails(tar(tmp_path / "a.tar", members), expected)


def test_more_tar_errors(tmp_path):
    path = tar(tmp_path / "b.tar", {"1.png": A, "1.cls": b"0"})
    tar(tmp_path / "a.tar", {"cat/1.png": A, "cat/about.json": b"{}"})
    said = fails(tmp_path, "one is a number, one a folder")
    assert f"{path}: 1.png" in said
    with tarfile.open(path, "w") as made:
        link = tarfile.TarInfo("cat/1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "cat/2.png"
        made.addfile(link)
    fails(path, "cat/1.png: is a link")


def test_tar_made_of_the_folder_itself(tmp_path):
    path = tar(tmp_path / "a.tar", {".": None, "./cat": None, "./cat/1.png": A, "./dog/1.png": A})
    assert open_images(path).classes == ["cat", "dog"]


def test_label_key_and_cls_first(tmp_path):
    members = {"1.png": A, "1.json": b'{"fine": 2, "label": 1}'}
    assert open_images(tar(tmp_path / "a.tar", members), label_key="fine").labels == [2]
    members["1.cls"] = b"3\n"
    assert open_images(tar(tmp_path / "b.tar", members)).labels == [3]


class Pixels(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(np.array(self.images.image(i)))


@each("webdataset, cls", "saved")
def test_workers(kind, tmp_path):
    images = open_images(KINDS[kind](tmp_path / "data", COLOUR))
    images.image(0)  # opens a file, which the workers then inherit
    rounds = DataLoader(Pixels(images), sampler=[*range(24)] * 20, batch_size=8, num_workers=2)
    for number, batch in enumerate(rounds):
        first = number * 8 % 24
        np.testing.assert_array_equal(batch, COLOUR[first : first + 8])


def test_open_tar_files(tmp_path):
    count = OPEN_FILES + 3
    for i in range(count):
        tar(tmp_path / f"{i}.tar", {"1.png": png(COLOUR[i % 24]), "1.cls": b"0"})
    images = open_images(tmp_path)
    assert not images._open
    for i in [*range(count), 0]:
        np.testing.assert_array_equal(np.asarray(images.image(i)), COLOUR[i % 24])
    assert len(images._open) == OPEN_FILES
    again = pickle.loads(pickle.dumps(images))
    assert isinstance(again, TarImages) and not again._open and len(images._open) == OPEN_FILES
    np.testing.assert_array_equal(np.asarray(again.image(5)), COLOUR[5])


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


@pytest.mark.slow
def test_arrow_keys_and_labels(tmp_path):
    selection.extra("train", "datasets")
    import datasets

    path = as_parquet(tmp_path / "data", GRAY, keys=("picture", "fine"))
    fails(path, "image_key: no column 'image', there is picture, fine")
    fails(path, "label_key: no column 'label'", image_key="picture")
    fails(path, "'fine' holds", "expected images", image_key="fine", label_key="fine")
    fails(path, "'picture' holds", "expected integers", image_key="picture", label_key="picture")
    images = open_images(path, image_key="picture", label_key="fine", mode="L")
    np.testing.assert_array_equal(pixels(images), GRAY)
    two = datasets.ClassLabel(names=["a", "b"])
    for labels, expected in (([0, None, 1], "image 1: no label"), ([0, -1], "image 1: label -1")):
        table(GRAY[: len(labels)], two, labels).save_to_disk(tmp_path / f"of{len(labels)}")
        fails(tmp_path / f"of{len(labels)}", expected)
    table([], two, []).save_to_disk(tmp_path / "empty")
    fails(tmp_path / "empty", "can't be read")
    table([], two, []).to_parquet(tmp_path / "empty.parquet")
    fails(tmp_path / "empty.parquet", "no data")
    table([], two, []).save_to_disk(tmp_path / "one", num_shards=1)
    fails(tmp_path / "one", "no image")
    for number in (1, 0):  # the first is where the columns are looked up
        (path / f"train-0000{number}-of-00002.parquet").write_bytes(b"PAR1 no, it is not PAR1")
        assert "arquet" in fails(path, "can't be read: ", image_key="picture", label_key="fine")


@pytest.mark.slow
def test_arrow_images_in_other_columns(tmp_path):
    selection.extra("train", "datasets")
    import datasets

    raw = [png(one) for one in GRAY[:2]]
    datasets.Dataset.from_dict({"image": raw, "label": [0, 1]}).to_parquet(tmp_path / "a.parquet")
    np.testing.assert_array_equal(pixels(open_images(tmp_path, mode="L")), GRAY[:2])
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = {"image": [{"bytes": raw[0], "path": None}, None], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "holes")
    with pytest.raises(Unreadable, match="there is no image"):
        open_images(tmp_path / "holes").image(1)


def test_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    fails(tmp_path, "pip install 'deit_fast[train]'", error=RuntimeError)


@pytest.mark.slow
def test_without_datasets_nothing_saved_is_read(tmp_path, monkeypatch):
    path = as_saved(tmp_path / "data", GRAY)
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(path, "pip install 'deit_fast[train]'", error=RuntimeError)


def test_idx_errors(tmp_path):
    path = as_idx(tmp_path / "data", GRAY)
    pictures, labels = sorted(path.iterdir())
    good = pictures.read_bytes()
    for content, expected in (
        (good[:-1], "735 bytes, expected 736 for the sizes [24, 5, 6]"),
        (good + b"0", "737 bytes, expected 736"),
        (b"\0\0\x08\x01" + good[4:], "begins with 00000801, expected 00000803"),
        (good[:9], "9 bytes, expected"),
        (b"", "begins with nothing"),
    ):
        pictures.write_bytes(content)
        assert str(pictures) in fails(path, expected)
    pictures.write_bytes(good)
    idx(labels, LABELS[:-1])
    assert str(labels) in fails(path, "23 labels, expected 24")
    idx(labels, LABELS, b"\0\0\x08\x03")
    fails(path, "begins with 00000803, expected 00000801")
    labels.unlink()
    fails(path, "no labels for it, expected train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz")
    packed = gzip.compress(good)
    pictures.with_name(pictures.name + ".gz").write_bytes(packed[:-20])
    idx(labels, LABELS)
    assert len(open_images(path)) == 24  # the unpacked one
    pictures.unlink()
    fails(path, "no whole gzip file")
    idx(path / "extra-images-idx3-ubyte", GRAY)
    fails(path, "expected one file of images")
    empty = tmp_path / "empty"
    idx(empty / "images-images-idx3-ubyte", GRAY[:0])
    idx(empty / "images-labels-idx1-ubyte", LABELS[:0])
    fails(empty, "no image")


@pytest.mark.slow
@pytest.mark.parametrize("split, count", [("train", 60000), ("validation", 10000)])
def test_fashion_mnist(split, count):
    selection.data(FASHION, "Fashion-MNIST")
    images = open_images(FASHION, split, mode="L")
    assert len(images) == count and images.classes == CLASSES[:10]
    assert np.bincount(images.labels).tolist() == [count // 10] * 10
    assert images.image(count - 1).size == (28, 28)


# What a seed chooses must never change: runs resume with it.
FROZEN = [1, 2, 5, 8, 10, 11, 13, 14, 16, 20, 22, 23, 25, 26, 27]


def test_fraction_is_balanced(tmp_path):
    path = tmp_path / "a.tar"
    sizes = {"a": 10, "b": 2, "c": 10, "d": 7}
    tar(path, {f"{c}/{i}.png": png(COLOUR[i]) for c, n in sizes.items() for i in range(n)})
    images = open_images(path)
    part = fraction(images, 15, seed=0)
    counts = np.bincount(part.labels, minlength=4)
    assert counts[1] == 2 and sorted(counts[[0, 2, 3]]) == [4, 4, 5] and len(part) == 15
    names = [part.name(i) for i in range(15)]
    assert len(set(names)) == 15 and part.classes == images.classes and part.mode == images.mode
    whole = {images.name(i): i for i in range(len(images))}
    places = [whole[name] for name in names]
    assert places == sorted(places)
    for i, place in enumerate(places):
        assert part.labels[i] == images.labels[place]
        np.testing.assert_array_equal(np.asarray(part.image(i)), np.asarray(images.image(place)))

    def chosen(count, seed):
        some = pickle.loads(pickle.dumps(fraction(images, count, seed)))
        return {some.name(i) for i in range(count)}

    assert chosen(15, 0) == set(names) != chosen(15, 1)
    assert chosen(6, 0) < chosen(15, 0) < chosen(28, 0)
    assert len(chosen(29, 0)) == 29
    assert any("a/9" in n or "c/9" in n for seed in range(9) for n in chosen(4, seed))
    assert places == FROZEN
    for count in (0, 30):
        with pytest.raises(ValueError, match=f"count: {count}, expected 1 to 29"):
            fraction(images, count, 0)
