"""Validation images split off from a training set."""

import numpy as np
import pytest
from checking import seeded
from small_datasets import COLOUR, as_folders, fails

from deit_fast.distill import run_folder
from deit_fast.distill.datasets import open_images
from deit_fast.distill.datasets.holdout import hold_out, rows, split_off
from deit_fast.distill.datasets.image_set import ImageSet


def labelled(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    return ImageSet([f"class {c}" for c in range(len(counts))], labels, "RGB")


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_each_class_gives_its_share(share):
    counts = np.array([2, 3, 10, 57, 400])
    images = labelled(counts)
    train, validation = split_off(images, share, 0)
    assert train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(len(images)))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    expected = np.clip(np.round(share * counts), 1, counts - 1)
    np.testing.assert_array_equal(np.bincount(images.labels[validation]), expected)


def test_the_seed_decides():
    images = labelled([50, 50])
    once, again, other = (split_off(images, 0.2, seed)[1].tolist() for seed in (3, 3, 4))
    assert once == again != other
    assert once != list(range(10)) + list(range(50, 60))
    # numpy's RandomState does not change: neither may a split, or runs would not go on
    assert split_off(labelled([6, 6]), 0.34, 0)[1].tolist() == [2, 4, 6, 10]


def test_groups_stay_together():
    draw = np.random.default_rng(seeded(0))
    for _ in range(20):
        counts = draw.integers(20, 60, 4)
        images = labelled(counts)
        groups = draw.integers(0, 60, len(images))  # of images of several classes too
        train, validation = split_off(images, 0.25, 1, groups)
        assert not set(groups[train]) & set(groups[validation])
        for side in (train, validation):
            assert set(images.labels[side]) == {0, 1, 2, 3}


@pytest.mark.parametrize("order", [1, -1])
def test_a_class_in_two_groups_of_another_is_on_both_sides(order):
    """Whatever is drawn for the larger class, and whichever comes first."""
    labels = np.array([0] * 20 + [0, 1] * 2)
    groups = np.array([*range(20), 20, 20, 21, 21])
    images = ImageSet(["a", "b"], labels if order == 1 else 1 - labels, "RGB")
    for seed in range(20):
        for side in split_off(images, 0.5, seed, groups):
            assert set(images.labels[side]) == {0, 1}


def test_a_large_group_does_not_take_the_share():
    images = labelled([100, 100])
    groups = np.arange(200)
    groups[:80] = 7  # of one scene
    groups[100:150], groups[150:200] = 300, 301  # two scenes, and nothing else
    _, validation = split_off(images, 0.2, 0, groups)
    assert np.bincount(images.labels[validation]).tolist() == [20, 50]


def test_what_cannot_be_split():
    images = labelled([4, 3, 1])
    with pytest.raises(ValueError, match="class class 2 has 1 images, of which 1 are no near-dup"):
        split_off(images, 0.2, 0)
    images = labelled([4, 3])
    with pytest.raises(ValueError, match="class class 1 has 3 images, of which 1 are no near-dup"):
        split_off(images, 0.2, 0, np.array([0, 1, 2, 3, 9, 9, 9]))
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="holdout: .*, expected a share above 0 and below 1"):
            split_off(images, share, 0)
    numbered = ImageSet(["0", "1", "2"], np.array([0, 0, 2, 2]), "L")  # nothing of 1 is there
    assert len(split_off(numbered, 0.5, 0)[1]) == 2


def test_a_record_is_read_again(tmp_path):
    images = open_images(as_folders(tmp_path / "data", np.concatenate([COLOUR[:23], COLOUR[:1]])))
    assert images.labels[0] == 0 and images.labels[-1] == 10
    train, validation = hold_out(images, 0.3, 5)
    both = {images.name(i) for i in (0, 23)}  # the same pixels
    assert sum(validation.name(i) in both for i in range(len(validation))) in (0, 2)
    record = tmp_path / "split.csv"
    run_folder.write_csv(record, rows(validation))
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = open_images(tmp_path / "moved")
    again = hold_out(moved, 0.3, 6, record=record)  # another seed would draw others
    for part, expected in zip(again, (train, validation), strict=True):
        np.testing.assert_array_equal(part.indices, expected.indices)
    # it is a table of images too
    run_folder.write_csv(record, rows(again[1]))
    assert len(open_images(record, "train")) == len(train)
    held = open_images(record, "validation")
    np.testing.assert_array_equal(np.asarray(held.image(0)), np.asarray(validation_pixels(again)))
    (tmp_path / "moved" / "0" / "0.PNG").rename(tmp_path / "moved" / "0" / "x.PNG")
    with pytest.raises(ValueError, match=r"split.csv: has .*0.PNG of class 0, now there is .*"):
        hold_out(open_images(tmp_path / "moved"), 0.3, 5, record=record)
    (tmp_path / "moved" / "0" / "x.PNG").unlink()
    with pytest.raises(ValueError, match="is of 24 images, now there are 23"):
        hold_out(open_images(tmp_path / "moved"), 0.3, 5, record=record)
    record.write_text("image,label,split\na,b,c\n")
    with pytest.raises(ValueError, match="split.csv: is no record of a split"):
        hold_out(moved, 0.3, 5, record=record)


def validation_pixels(parts):
    return parts[1].image(0)


def test_the_mode_of_a_part_is_the_whole_sets(tmp_path):
    images = open_images(as_folders(tmp_path, COLOUR))
    train, validation = hold_out(images, 0.4, 0)
    train.mode = validation.mode = "L"
    assert train.image(0).mode == validation.image(0).mode == images.image(0).mode == "L"
    fails(tmp_path, "no split 'train'", split="train")
