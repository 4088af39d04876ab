"""A part of a set of images, drawn evenly over the classes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from .image_set import ImageSet


class Subset(ImageSet):
    """Some of the images of another set.

    Args:
        images: The whole set.
        indices: int64 (n,), the images that are taken, in order.
    """

    def __init__(self, images: ImageSet, indices: np.ndarray):
        self.images, self.indices = images, indices
        super().__init__(images.classes, images.labels[indices], images.mode)

    @property
    def mode(self) -> str:
        """The whole set's."""
        return self.images.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self.images.mode = mode

    def name(self, i: int) -> str:
        """What the whole set calls this image."""
        return self.images.name(self.indices[i])

    @contextmanager
    def stored(self, i: int) -> Iterator[Image.Image]:
        """Open image i; see `ImageSet.stored`."""
        with self.images.stored(self.indices[i]) as image:
            yield image


def fraction(images: ImageSet, count: int, seed: int) -> Subset:
    """Draw `count` of the images at random, spread over the classes as evenly as they allow.

    Images keep their order. With the same seed a smaller fraction is a part of a larger one.

    Raises:
        ValueError: The count is not in 1..len(images).
    """
    if not 1 <= count <= len(images):
        raise ValueError(
            f"count: {count}, expected 1 to {len(images)}, which is how many there are"
        )
    # Not default_rng: numpy keeps only RandomState's stream the same from version to version.
    order = np.random.RandomState(seed).permutation(len(images))
    by_class = np.argsort(images.labels[order], kind="stable")
    counts = np.bincount(images.labels)
    rank = np.empty(len(order), np.int64)  # how many of its class come before it
    rank[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Subset(images, np.sort(order[np.argsort(rank, kind="stable")[:count]]))
