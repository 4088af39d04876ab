"""Small data sets of every kind that `deit_fast.distill.datasets` reads."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import selection
from checking import seeded
from PIL import Image

from deit_fast.distill.datasets import open_images

CLASSES = [str(c) for c in range(11)]  # "10" comes after "9" in natural order alone
LABELS = np.sort(np.arange(24) % 11)
GRAY = np.random.default_rng(seeded(0)).integers(0, 256, (24, 5, 6), dtype=np.uint8)
COLOUR = np.random.default_rng(seeded(1)).integers(0, 256, (24, 5, 6, 3), dtype=np.uint8)
NAMED = ["ant", "Bee", "bee", "bee2", "bee10", "cat", "dog", "eel", "fly", "gnu", "hen"]
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


def as_table(path, pixels, classes=CLASSES):
    rows = ["path,label"]
    for i, (one, label) in enumerate(zip(pixels, LABELS, strict=True)):
        (path / "of all").mkdir(parents=True, exist_ok=True)
        (path / "of all" / f"{i}.png").write_bytes(png(one))
        rows.append(f"of all/{i}.png,{classes[label]}")
    (path / "images.csv").write_text("\n".join(rows))
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
    "table": as_table,
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


def each(*kinds):
    marked = [pytest.param(k, marks=pytest.mark.slow if k in EXTRA else ()) for k in kinds]
    return pytest.mark.parametrize("kind", marked)


def pixels(images):
    return np.stack([np.asarray(images.image(i)) for i in range(len(images))])


def fails(path, *expected, split=None, error=ValueError, **options):
    """Opening must fail, in one line that has the path and every expected part."""
    with pytest.raises(error) as raised:
        open_images(path, split, **options)
    said = str(raised.value)
    assert said.startswith(f"data {path}"), said
    assert all(part in said for part in expected), said
    return said
