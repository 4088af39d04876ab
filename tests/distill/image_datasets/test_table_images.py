"""Tables of images: .csv and .parquet files of paths and labels."""

import os
import sys

import numpy as np
import pytest
import selection
from small_datasets import COLOUR, as_folders, as_parquet, fails, pixels, png

from deit_fast.distill.datasets import has_split, open_images


def table(folder, text, count=4, name="images.csv", **options):
    """A table beside `count` images, 0.png and so on in pictures/."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / "pictures" / f"{i}.png").write_bytes(png(COLOUR[i]))
    (folder / name).write_text(text.replace("@", "pictures/"), **options)
    return folder / name


SPLIT = "path,label,split\n@0.png,cat,train\n@1.png,dog,val\n@2.png,dog,Train\n@3.png,cat,val\n"


def names(images):
    return [os.path.basename(images.name(i)) for i in range(len(images))]


def test_the_column_split(tmp_path):
    file = table(tmp_path, SPLIT + "@0.png,cat,test\n@1.png,dog,test\n".replace("@", "pictures/./"))
    for path in (file, tmp_path):  # the table, or the folder it lies in
        train, validation = open_images(path, "train"), open_images(path, "validation")
        assert (names(train), train.labels.tolist()) == (["0.png", "2.png"], [0, 1])
        assert (names(validation), validation.labels.tolist()) == (["1.png", "3.png"], [1, 0])
        assert train.classes == validation.classes == ["cat", "dog"]  # val comes before test
        np.testing.assert_array_equal(np.asarray(train.image(1)), COLOUR[2])
        fails(path, "holds the splits test, train, val: say which")
        assert has_split(path, "train") and has_split(path, "validation")
    file.write_text("path,label,split\npictures/0.png,cat,train\npictures/1.png,dog,train\n")
    fails(tmp_path, "no split 'validation'", "named val", "there is train", split="validation")
    assert len(open_images(tmp_path)) == 2 and not has_split(tmp_path, "validation")
    file.write_text("path,label,split\npictures/0.png,cat,train\npictures/1.png,dog,val\n")
    fails(tmp_path, "no image in the split 'train' of the class dog", split="train")


def test_splits_in_files_of_their_own(tmp_path):
    table(tmp_path, "path,label\n@0.png,a\n@1.png,b\n", name="train.csv")
    table(tmp_path, "path,label\n@3.png,b\n@2.png,a\n", name="my_valid.csv")
    assert names(open_images(tmp_path, "train")) == ["0.png", "1.png"]
    assert names(open_images(tmp_path, "validation")) == ["3.png", "2.png"]
    assert names(open_images(tmp_path / "train.csv")) == ["0.png", "1.png"]
    fails(tmp_path, "holds the splits train, valid: say which")


@pytest.mark.parametrize(
    "text, options",
    [
        ("path;label;more\r\n@0.png;Bär, groß;1\r\n@1.png;ant;\r\n", {"encoding": "utf-8-sig"}),
        ('"label"\t path \nBär, groß\t @0.png\n\nant\t@1.png\n\n', {"encoding": "utf-8"}),
        ('path,label\n@0.png,"Bär, groß"\n@1.png, ant', {"encoding": "utf-8"}),
    ],
    ids=["semicolons", "tabs", "quotes"],
)
def test_what_programs_call_csv(text, options, tmp_path):
    images = open_images(table(tmp_path, text, **options))
    assert images.classes == ["ant", "Bär, groß"] and images.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(np.asarray(images.image(0)), COLOUR[0])


def test_other_columns_and_absolute_paths(tmp_path):
    file = table(tmp_path, f"image,breed\n{tmp_path}/pictures/1.png,a\n@0.png,b\n")
    keys = {"label_key": "breed"}
    np.testing.assert_array_equal(pixels(open_images(file, **keys)), COLOUR[[1, 0]])
    fails(file, "no column 'label', there is image, breed")
    table(tmp_path, "file,breed\n@0.png,a\n@1.png,b\n")
    assert len(open_images(tmp_path, image_key="file", **keys)) == 2
    fails(file, "no column 'path', there is file, breed", **keys)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ["images.csv", "no column 'path', there is nothing"]),
        ("path,label\n", ["images.csv", "no image"]),
        ("path,label\n@0.png,a\n@1.png\n", ["images.csv, line 3", "1 cells, expected 2"]),
        ("path,label\n@0.png,a\n@1.png,\n", ["images.csv, line 3", "no label"]),
        ("path,label\n,a\n", ["images.csv, line 2", "no path"]),
        ("path,label\n@0.png,a\n@8.png,b\n@9.png,b\n", ["line 3", "no file", "8.png and 1 more"]),
        ("path,label\n@,a\n", ["line 2", "no file"]),
        ("path,label\n@0.png,a\n@0.png,b\n", ["line 3", "has the labels a and b, expected one"]),
        ("path,label,split\n@0.png,a,dev\n", ["line 2", "split 'dev', expected one of train, val"]),
        ("path,label,split\n@0.png,a,\n", ["line 2", "split ''"]),
        ('path,label\n@0.png,"a', ["images.csv", "is no CSV"]),
        ("path,label\n@0.png,1\n@1.png,0\n@2.png,3\n", ["classes are numbers", "there is no 2"]),
    ],
)
def test_errors_of_tables(text, expected, tmp_path):
    said = fails(table(tmp_path, text), *expected)
    assert "\n" not in said


def test_errors_of_files(tmp_path):
    file = table(tmp_path, "path,label\n@0.png,ä\n", encoding="latin-1")
    fails(file, "is no UTF-8 text")
    table(tmp_path, SPLIT, name="more.csv")
    file.write_text("path,label\npictures/0.png,a\n")
    fails(tmp_path, "only some of images.csv, more.csv have a column 'split'", split="train")


def test_what_is_no_table_stays_what_it_was(tmp_path):
    """Notes beside folders of classes, and a table beside train/ and val/."""
    as_folders(tmp_path / "a", COLOUR)
    (tmp_path / "a" / "notes.csv").write_text("day,weather\n1,rain\n")
    assert len(open_images(tmp_path / "a")) == 24
    for split in ("train", "val"):
        as_folders(tmp_path / "b" / split, COLOUR)
    (tmp_path / "b" / "labels.csv").write_text("path,label\ntrain/0/0.PNG,0\n")
    assert len(open_images(tmp_path / "b", "train")) == 24
    fails(tmp_path / "b", "more than one way", "labels.csv", "train, val")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.csv").write_text("day,weather\n1,rain\n")
    fails(tmp_path / "c", "nothing recognised", "columns path and label")


@pytest.mark.slow
def test_parquet(tmp_path):
    selection.extra("parquet", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    table(tmp_path, "")
    (tmp_path / "images.csv").unlink()
    paths = [f"pictures/{i}.png" for i in range(3)]
    columns = {"path": paths, "label": [1, 0, 1], "split": ["train", "train", "valid"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "images.parquet")
    images = open_images(tmp_path, "train")
    assert names(images) == ["0.png", "1.png"] and images.labels.tolist() == [1, 0]
    fails(tmp_path, "no image in the split 'valid' of the class 0", split="validation")
    columns = {"path": [*paths[:2], None], "label": ["a", "b", "b"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "images.parquet")
    fails(tmp_path / "images.parquet", "row 2", "no path")
    as_parquet(tmp_path / "of images", COLOUR)  # told apart from those that hold the images
    assert len(open_images(tmp_path / "of images")) == 24


@pytest.mark.slow
def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    selection.extra("parquet", "pyarrow")
    from deit_fast.distill.datasets import table as module

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"needs the package pyarrow.*deit_fast\[parquet\]"):
        module.read([tmp_path / "a.parquet"], "image", "label")
