"""A set of labelled images, and what all kinds of them share: errors, orders and classes."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key

from deit_fast.images import Unreadable, convert, opened

# What a split's folders, files or rows may be called: the first that is there is taken.
SPLITS = {"train": ("train",), "validation": ("val", "validation", "valid", "test", "t10k")}
SPLIT_WORDS = {word for words in SPLITS.values() for word in words}


class ImageSet:
    """Labelled images.

    Can be pickled and used after a fork: files are opened by the process that reads them.

    Args:
        classes: Names, in index order.
        labels: int64 (n,), each an index of `classes`.
        mode: What images are converted to, "RGB" or "L".
    """

    def __init__(self, classes: list[str], labels: np.ndarray, mode: str):
        self.classes, self.labels, self.mode = classes, labels, mode

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What an error message calls image i."""
        raise NotImplementedError

    def image(self, i: int) -> Image.Image:
        """Decode image i and convert it to `mode`, see `deit_fast.images.convert`.

        Raises:
            Unreadable: It can't be decoded; the message says why.
        """
        with self.stored(i) as image:
            return convert(image, self.mode)

    @contextmanager
    def stored(self, i: int) -> Iterator[Image.Image]:
        """Open image i as it is stored, before any conversion.

        Raises:
            Unreadable: It can't be opened or decoded; the message says why.
        """
        file = self._file(i)
        if file is None:
            raise Unreadable("there is no image")
        with opened(file) as image:
            yield image

    def _file(self, i: int) -> str | io.BytesIO | None:
        """Return a path, a file object, or None where there is no image."""
        raise NotImplementedError


def data_error(path: str | Path, reason: str) -> ValueError:
    """The error for data that can't be used, with the path in front."""
    return ValueError(f"data {path}: {reason}")


def natural_order(name: str) -> tuple:
    """Sort key: numbers by value, and no two names equal."""
    return natural_key(name), name  # natural_key alone takes a1, A1 and a01 for the same


def listed(items: Sequence[Path | str]) -> str:
    """Up to eight names, and how many more there are."""
    names = [item.name if isinstance(item, Path) else item for item in items]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more


def labels_of_folders(
    path: str | Path, folder_of: list[str], folders: Iterable[str]
) -> tuple[np.ndarray, list[str]]:
    """Number the folders of classes.

    Args:
        path: For errors.
        folder_of: The folder of each image.
        folders: All folders of classes; each must have an image.

    Returns:
        int64 labels (n,) and the names of the classes.
    """
    known = set(folders)
    names = sorted({*folder_of, *known}, key=natural_order)
    if empty := sorted(known.difference(folder_of), key=natural_order):
        raise data_error(path, f"no image in the folder of the class {listed(empty)}")
    if all(name.isascii() and name.isdigit() for name in names):
        # As ImageNet-V2's: a missing one would shift those after it.
        if missing := sorted(set(range(len(names))) - set(map(int, names))):
            raise data_error(path, f"classes are numbers from 0, but there is no {missing[0]}")
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[folder] for folder in folder_of], np.int64), names


def match_classes(
    path: str | Path,
    labels: np.ndarray,
    names: list[str] | None,
    classes: list[str] | None,
    name: Callable[[int], str],
) -> tuple[list[str], np.ndarray]:
    """Bring labels into the order of the expected classes.

    Args:
        path: For errors.
        labels: int64 (n,), indices of `names`.
        names: Of the classes that were found. None: they are numbers.
        classes: Those that are expected. None: whatever was found.
        name: What to call image i in an error.

    Returns:
        (classes, labels), as `ImageSet` has them.
    """
    if names is not None:
        count = len(names)
    else:
        count = int(labels.max()) + 1 if classes is None else len(classes)
    bad = np.flatnonzero((labels < 0) | (labels >= count))
    if len(bad):
        reason = f"label {labels[bad[0]]}, but classes are numbered from 0, and there are {count}"
        raise data_error(name(bad[0]), reason)
    if names is None:
        return list(map(str, range(count)) if classes is None else classes), labels
    if classes is None:
        return list(names), labels
    missing = sorted({*classes} - {*names}, key=natural_order)
    extra = sorted({*names} - {*classes}, key=natural_order)
    if missing or extra:
        reason = f"not the same classes: missing {listed(missing)}; extra {listed(extra)}"
        raise data_error(path, reason)
    place = {name: index for index, name in enumerate(classes)}
    return list(classes), np.array([place[name] for name in names], np.int64)[labels]
