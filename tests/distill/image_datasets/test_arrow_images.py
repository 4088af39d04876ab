"""Hugging Face datasets, as .parquet files or saved to disk."""

import sys

import numpy as np
import pytest
import selection
from small_datasets import (
    GRAY,
    as_parquet,
    as_saved,
    fails,
    pixels,
    png,
    table,
)

from deit_fast.distill.datasets import open_images
from deit_fast.images import Unreadable


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
