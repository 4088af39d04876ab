"""Folders of classes."""

import os

from PIL import Image
from small_datasets import (
    COLOUR,
    GRAY,
    as_folders,
    fails,
    png,
)
from timm.data.readers import create_reader

from deit_fast.distill.datasets import open_images


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
