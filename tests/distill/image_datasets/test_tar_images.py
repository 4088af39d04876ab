"""Images in tar files."""

import gzip
import pickle
import tarfile

import numpy as np
import pytest
from small_datasets import (
    COLOUR,
    GRAY,
    fails,
    png,
    tar,
)

from deit_fast.distill.datasets import open_images
from deit_fast.distill.datasets.tars import OPEN_FILES, TarImages


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
