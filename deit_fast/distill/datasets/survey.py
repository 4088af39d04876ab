"""What a data set is like, before it is trained on: counts, sizes, damage, duplicates."""

import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deit_fast.images import Unreadable

from . import has_split, open_images, similar
from .image_set import SPLITS, ImageSet
from .scan import scan

TINY = 32  # pixels of a side
NARROW = 4  # times as long as wide
_ORIENTATION = 0x0112  # EXIF's tag

# what is odd about images, and what it means for training
ODD = {
    "16 bits": "the upper 8 are taken",
    "alpha": "dropped: what is transparent shows the colour stored for it",
    "animated": "the first frame is taken",
    "turned by EXIF": "the orientation is not applied, as in timm",
    f"under {TINY} pixels": "enlarged, if the model's images are larger",
    f"over {NARROW} : 1": "cropped at both ends, or much of it",
}


class Facts(NamedTuple):
    """What is found out about an image.

    Attributes:
        size: (width, height) in pixels, as stored.
        mode: Pillow's.
        odd: Keys of `ODD`.
        fingerprint: See `similar`.
    """

    size: tuple[int, int]
    mode: str
    odd: tuple[str, ...]
    fingerprint: similar.Fingerprint


class Survey(NamedTuple):
    """What a data set is like. Indices count through the splits, one after the other.

    Attributes:
        splits: "train" and "validation", as far as they are there, or "all".
        facts: Of each image, or why it is unreadable.
        equal: int64 (n,), the same number for images of equal pixels.
        groups: int64 (n,), the same number for these and near-duplicates.
    """

    splits: dict[str, ImageSet]
    facts: list[Facts | str]
    equal: np.ndarray
    groups: np.ndarray

    def places(self) -> list[tuple[str, int]]:
        """(split, index in it) of each image."""
        return [(name, i) for name, images in self.splits.items() for i in range(len(images))]

    def unreadable(self) -> list[tuple[str, str]]:
        """(name, reason) of the images that can't be decoded."""
        pairs = zip(self.places(), self.facts, strict=True)
        return [(self.splits[s].name(i), fact) for (s, i), fact in pairs if isinstance(fact, str)]

    def duplicates(self) -> list[dict[str, Any]]:
        """Groups of images that show the same, those across splits first.

        Returns:
            Of each group "equal" (whether all pixels are), "across" (whether images of more than
            one split are in it), "classes" (sorted), and "images", as [split, name].
        """
        members: dict[int, list[int]] = {}
        for i, number in enumerate(self.groups.tolist()):
            members.setdefault(number, []).append(i)
        places, found = self.places(), []
        for some in members.values():
            if len(some) < 2:
                continue
            here = [places[i] for i in some]
            classes = {self.splits[s].classes[self.splits[s].labels[i]] for s, i in here}
            found.append({
                "equal": len(set(self.equal[some].tolist())) == 1,
                "across": len({split for split, _ in here}) > 1, "classes": sorted(classes),
                "images": [[split, self.splits[split].name(i)] for split, i in here],
            })  # fmt: skip
        return sorted(found, key=lambda group: not group["across"])

    def odd(self) -> dict[str, list[str]]:
        """{what is odd: names of the images}, for what there is of `ODD`."""
        found: dict[str, list[str]] = {kind: [] for kind in ODD}
        for (split, i), fact in zip(self.places(), self.facts, strict=True):
            for kind in () if isinstance(fact, str) else fact.odd:
                found[kind].append(self.splits[split].name(i))
        return {kind: names for kind, names in found.items() if names}

    def summary(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        unreadable, duplicates = self.unreadable(), self.duplicates()
        return {
            "images": len(self.facts),
            "splits": {name: self._split(name) for name in self.splits},
            "unreadable": [list(pair) for pair in unreadable],
            "duplicates": duplicates,
            "across_splits": sum(group["across"] for group in duplicates),
            "odd": {kind: names for kind, names in self.odd().items()},
        }

    def _split(self, name: str) -> dict[str, Any]:
        images = self.splits[name]
        counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
        pairs = zip(self.places(), self.facts, strict=True)
        facts = [fact for (split, _), fact in pairs if split == name and isinstance(fact, Facts)]
        there = [count for count in counts if count]
        sides = {
            side: {"min": min(values), "median": statistics.median(values), "max": max(values)}
            for side, values in (
                ("width", [fact.size[0] for fact in facts]),
                ("height", [fact.size[1] for fact in facts]),
            )
            if values
        }
        return {
            "images": len(images), "classes": dict(zip(images.classes, counts, strict=True)),
            "imbalance": max(there) / min(there), **sides,
            "modes": dict(Counter(fact.mode for fact in facts).most_common()),
        }  # fmt: skip


def survey(
    path: str | Path, *, workers: int = 0, image_key: str = "image", label_key: str = "label",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Survey:  # fmt: skip
    """Look at every image of a data set.

    Args:
        path: See `open_images`. Both splits are looked at, or all there is if it has none.
        workers: Processes that decode; 0: this one.
        image_key: See `open_images`.
        label_key: See `open_images`.
        progress: Told how many images are done, of how many.

    Raises:
        ValueError: As `open_images`: of damages other than unreadable images.
        FileNotFoundError: Nothing is at `path`.
    """
    keys: dict[str, Any] = {"image_key": image_key, "label_key": label_key}
    names: list[str | None] = [*SPLITS] if Path(path).exists() else []
    names = [name for name in names if has_split(path, str(name), **keys)]
    splits: dict[str, ImageSet] = {}
    for name in names or [None]:
        known = next(iter(splits.values())).classes if splits else None
        splits[name or "all"] = open_images(path, name, classes=known, **keys)
    total = sum(map(len, splits.values()))
    facts: list[Facts | str] = []
    for images in splits.values():
        facts += scan(images, _look, workers, partial(_further, progress, len(facts), total))
    fingerprints = [None if isinstance(fact, str) else fact.fingerprint for fact in facts]
    return Survey(splits, facts, similar.equal(fingerprints), similar.group(fingerprints))


def _further(progress: Callable[[int, int], object], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _look(images: ImageSet, i: int) -> Facts | str:
    try:
        with images.stored(i) as image:
            size, mode, odd = image.size, image.mode, _odd(image)
            return Facts(size, mode, odd, similar.fingerprint(image))
    except Unreadable as error:
        return str(error)


def _odd(image: Image.Image) -> tuple[str, ...]:
    short, long = sorted(image.size)
    found = {
        "16 bits": image.mode.startswith("I"),
        "alpha": image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info,
        "animated": getattr(image, "is_animated", False),
        "turned by EXIF": image.getexif().get(_ORIENTATION, 1) not in (0, 1),
        f"under {TINY} pixels": short < TINY,
        f"over {NARROW} : 1": long > NARROW * short,
    }
    return tuple(kind for kind, is_so in found.items() if is_so)
