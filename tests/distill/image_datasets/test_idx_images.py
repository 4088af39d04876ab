"""IDX files, as MNIST's."""

import gzip

import numpy as np
import pytest
import selection
from small_datasets import (
    CLASSES,
    FASHION,
    GRAY,
    LABELS,
    as_idx,
    fails,
    idx,
)

from deit_fast.distill.datasets import open_images


def test_idx_errors(tmp_path):
    path = as_idx(tmp_path / "data", GRAY)
    images, labels = sorted(path.iterdir())
    good = images.read_bytes()
    for content, expected in (
        (good[:-1], "735 bytes, expected 736 for the sizes [24, 5, 6]"),
        (good + b"0", "737 bytes, expected 736"),
        (b"\0\0\x08\x01" + good[4:], "begins with 00000801, expected 00000803"),
        (good[:9], "9 bytes, expected"),
        (b"", "begins with nothing"),
    ):
        images.write_bytes(content)
        assert str(images) in fails(path, expected)
    images.write_bytes(good)
    idx(labels, LABELS[:-1])
    assert str(labels) in fails(path, "23 labels, expected 24")
    idx(labels, LABELS, b"\0\0\x08\x03")
    fails(path, "begins with 00000803, expected 00000801")
    labels.unlink()
    fails(path, "no labels for it, expected train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz")
    packed = gzip.compress(good)
    images.with_name(images.name + ".gz").write_bytes(packed[:-20])
    idx(labels, LABELS)
    assert len(open_images(path)) == 24  # the unpacked one
    images.unlink()
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
