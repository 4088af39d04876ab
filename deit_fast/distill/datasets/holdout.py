"""A validation set split off from a training set: stratified, seeded, and without leaks."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import similar
from .image_set import ImageSet, data_error
from .subset import Subset

_SIDES = ("train", "validation")


def split_off(
    images: ImageSet, share: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose images to validate on, by class, at random.

    Each class gives `share` of its images, rounded, but at least one, as far as its groups allow:
    no more where a group does not fit. The order of images, which depends on names and contents
    alone, decides nothing but the draw.

    Args:
        images: The set.
        share: How much of it is split off, above 0 and below 1.
        seed: Of the draw.
        groups: int64 (n,), such as `similar.groups` finds: images with the same number come to the
            same side. None: each image for itself.

    Returns:
        int64 indices (train, validation), in ascending order.

    Raises:
        ValueError: The share is out of range, or a class can't be on both sides.
    """
    _require_share(share)
    if groups is None:
        groups = np.arange(len(images))
    _, group_of = np.unique(groups, return_inverse=True)
    count = int(group_of.max()) + 1
    # Not default_rng: numpy keeps only RandomState's stream the same from version to version.
    rank = np.random.RandomState(seed).permutation(count)
    chosen, decided = np.zeros(count, bool), np.zeros(count, bool)
    # First the classes with the fewest groups: a group of images of two classes is theirs to place
    for members, sizes in sorted(_members(group_of, images.labels), key=lambda one: len(one[0])):
        drawn = np.argsort(rank[members])
        members, sizes = members[drawn], sizes[drawn]
        total = int(sizes.sum())
        left = min(max(round(share * total), 1), total - 1) - int(sizes[chosen[members]].sum())
        free = np.flatnonzero(~decided[members])
        for i in free:
            if sizes[i] <= left:
                chosen[members[i]] = True
                left -= sizes[i]
        if len(free) and len(members) > 1 and not chosen[members].any():
            chosen[members[free[np.argmin(sizes[free])]]] = True
        decided[members] = True
    held = chosen[group_of]
    for label, name in enumerate(images.classes):
        of_class = images.labels == label
        if not of_class.any() or (of_class & held).any() and (of_class & ~held).any():
            continue
        apart = len(np.unique(group_of[of_class]))
        raise ValueError(
            f"holdout: class {name} has {of_class.sum()} images, of which {apart} are no "
            "near-duplicates of each other, expected 2 or more to be on both sides"
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _require_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"holdout: {share}, expected a share above 0 and below 1")


def _members(group_of: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each class that has images: its groups, and how many of its images each has."""
    return [np.unique(group_of[labels == label], return_counts=True) for label in np.unique(labels)]


def hold_out(
    images: ImageSet, share: float, seed: int, *, record: Path | None = None, workers: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[Subset, Subset]:  # fmt: skip
    """Split a set into images to train on and images to validate on.

    Near-duplicates stay together, see `similar`.

    Args:
        images: The whole set.
        share: See `split_off`.
        seed: See `split_off`.
        record: A file that `rows` went into, whose split is taken as it is. None: draw one.
        workers: Processes that decode; 0: this one.
        progress: Told how many images have been compared.

    Returns:
        (train, validation), parts of `images`.

    Raises:
        ValueError: As `split_off`; or the record is damaged, or of other images.
    """
    _require_share(share)
    if record is not None:
        train, validation = _read(record, images)
    else:
        alike = similar.groups(images, workers, progress)
        train, validation = split_off(images, share, seed, alike)
    return Subset(images, train), Subset(images, validation)


def rows(validation: Subset) -> list[dict[str, str]]:
    """The record of a split, a row an image of the whole set: image, label, split."""
    images = validation.images
    held = np.zeros(len(images), np.int64)
    held[validation.indices] = 1
    return [
        {"image": _place(images.name(i)), "label": images.classes[label], "split": _SIDES[side]}
        for i, (label, side) in enumerate(zip(images.labels, held, strict=True))
    ]  # fmt: skip


def _place(name: str) -> str:
    """The name, where it is a path an absolute one: the record is a table of images too."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _read(record: Path, images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Read the indices of a recorded split, if it is of these images."""
    try:
        with open(record, encoding="utf-8", newline="") as file:
            found = [(row["image"], row["label"], row["split"]) for row in csv.DictReader(file)]
        sides = np.array([_SIDES.index(split) for *_, split in found], np.int64)
    except (KeyError, ValueError, csv.Error) as error:
        raise data_error(record, f"is no record of a split ({error!r})") from error
    if len(found) != len(images):
        counts = f"is of {len(found)} images, now there are {len(images)} (restart splits anew)"
        raise data_error(record, counts)
    for i, (image, label, _) in enumerate(found):
        name = images.name(i).encode(errors="backslashreplace").decode()
        of_class = images.classes[images.labels[i]]
        if (_file_name(image), label) != (_file_name(name), of_class):
            other = f"has {image} of class {label}, now there is {name} of class {of_class}"
            raise data_error(record, f"{other} (restart splits anew)")
    return np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)


def _file_name(name: str) -> str:
    """Files may be moved: the folder is not compared."""
    return name.rpartition("/")[2]
