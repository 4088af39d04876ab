"""Images that show the same: equal pixels, or the same picture saved another way.

Equal pixels always count. Other images are near-duplicates if

1. no side of either has less than `SMALL` pixels: in 28 x 28 pixels many shirts look alike,
2. their perceptual hashes differ in at most `DISTANCE` of 64 bits: the signs of the 64 lowest
   frequencies but the mean, of a DCT of the image in grey, averaged to 32 x 32 (pHash), and
3. the correlation of those 32 x 32 pixels is at least `CORRELATION`.

So the same photograph in another size, file format, quality, brightness or contrast, in grey, or
with a hundredth of its border cut off is one; a mirrored or rotated one is not. How the constants
were chosen: docs/guide/training.md. What is flat but for noise is never a near-duplicate.

Hashes within the distance are found without comparing all pairs. Of four bands of 16 bits, one
differs in at most one bit (7 < 4 x 2): images are sorted by each band with each of its bits left
out, 64 times in all, and neighbours with the same key are compared. Each band has low and high
frequencies: low ones alone are the same in many images of one subject.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from PIL import Image

from deit_fast.images import Unreadable, convert

from .image_set import ImageSet
from .scan import scan

DISTANCE = 7  # bits
CORRELATION = 0.95
SMALL = 64  # pixels
FLAT = 2.0  # standard deviation in grey levels, of 255
_SIDE = 32  # of what hashes and correlations are computed of
_DRAFT = 256  # pixels of a side that a JPEG is decoded to at least, where it is much larger
_PAIRS = 1 << 14  # pairs of images whose pixels are compared at a time


class Fingerprint(NamedTuple):
    """What is kept of an image to find others like it.

    Attributes:
        digest: 16 bytes, of size and pixels.
        hash: 64 bits.
        pixels: uint8 (32 * 32,), in grey.
        small: Whether a side has less than `SMALL` pixels.
    """

    digest: bytes
    hash: int
    pixels: np.ndarray
    small: bool


def _dct() -> np.ndarray:
    """The DCT-II of 32 numbers as a matrix, but for the scale of the first row."""
    k, x = np.arange(_SIDE)[:, None], np.arange(_SIDE)
    return np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE))


_DCT = _dct()
_ORDER = sorted(np.ndindex(_SIDE, _SIDE), key=lambda uv: (sum(uv), max(uv), uv))[1:65]
_LOWEST = np.array([_ORDER[i] for band in range(4) for i in range(band, 64, 4)]).T  # (2, 64)


def fingerprint(image: Image.Image) -> Fingerprint:
    """Compute what is compared of an image.

    Args:
        image: As it is stored, see `ImageSet.stored`.

    Raises:
        Exception: Whatever Pillow raises for a broken file.
    """
    small = min(image.size) < SMALL
    header = f"{image.size}".encode()
    image.draft(None, (_DRAFT, _DRAFT))  # JPEG alone: the same for the same file, and much faster
    colour = convert(image, "RGB")
    digest = blake2b(header + colour.tobytes(), digest_size=16).digest()
    grey = colour.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(grey)
    frequencies = (_DCT @ pixels.astype(np.float64) @ _DCT.T)[_LOWEST[0], _LOWEST[1]]
    bits = np.packbits(frequencies > 0)
    return Fingerprint(digest, int.from_bytes(bits.tobytes(), "big"), pixels.reshape(-1), small)


def groups(
    images: ImageSet, workers: int = 0, progress: Callable[[int], object] = lambda done: None
) -> np.ndarray:
    """Number images so that those that show the same have the same number.

    An unreadable image has a number of its own.

    Args:
        images: The set.
        workers: Processes that decode; 0: this one.
        progress: Told how many images are decoded.

    Returns:
        int64 (n,), the index of the first image of each group.
    """
    return group(list(scan(images, _look, workers, progress)))


def _look(images: ImageSet, i: int) -> Fingerprint | None:
    try:
        with images.stored(i) as image:
            return fingerprint(image)
    except Unreadable:
        return None


def equal(fingerprints: list[Fingerprint | None]) -> np.ndarray:
    """Number images so that those of equal pixels have the same number.

    Returns:
        int64 (n,), the index of the first; of what is None, its own.
    """
    first: dict[bytes, int] = {}
    pairs = enumerate(fingerprints)
    found = [i if one is None else first.setdefault(one.digest, i) for i, one in pairs]
    return np.array(found, np.int64)


def group(fingerprints: list[Fingerprint | None]) -> np.ndarray:
    """Number images so that equal ones and near-duplicates have the same number.

    Returns:
        int64 (n,), the index of the first image of each group; of what is None, its own.
    """
    labels = equal(fingerprints)
    firsts = [i for i in np.unique(labels) if fingerprints[i] is not None]
    kept = [one for i in firsts if (one := fingerprints[i]) is not None]
    if not kept:
        return labels
    pixels = np.stack([one.pixels for one in kept])
    compared = pixels.std(1, dtype=np.float32) >= FLAT
    compared &= ~np.array([one.small for one in kept])
    places = np.array(firsts, np.int64)[compared]
    hashes = np.array([one.hash for one in kept], np.uint64)[compared]
    near = _Near(hashes, pixels[compared]).labels()
    renamed = np.arange(len(labels))
    renamed[places] = places[near]
    return renamed[labels]


class _Near:
    """The search among images of different pixels.

    Args:
        hashes: uint64 (n,).
        pixels: uint8 (n, 1024).
    """

    def __init__(self, hashes: np.ndarray, pixels: np.ndarray):
        self.hashes, self.pixels = hashes, pixels
        self.mean = pixels.mean(1, dtype=np.float32)
        self.deviation = pixels.std(1, dtype=np.float32)
        self.parents = np.arange(len(hashes))

    def labels(self) -> np.ndarray:
        """int64 (n,): the index of the first image of each group."""
        everything = np.arange(len(self.hashes))
        self._unite(everything, self.hashes)
        # then one image for each group and hash: a thousand frames of one scene are one
        _, some = np.unique(np.stack([self.hashes, self.parents.astype(np.uint64)]), axis=1,
                            return_index=True)  # fmt: skip
        some.sort()
        for band in range(0, 64, 16):
            of_band = (self.hashes[some] >> np.uint64(band)).astype(np.uint16)
            for bit in range(16):
                self._unite(some, of_band & np.uint16(0xFFFF ^ (1 << bit)))
        return self.parents

    def _unite(self, indices: np.ndarray, keys: np.ndarray) -> None:
        """Unite the near-duplicates among images whose keys are equal."""
        for a, b in _with_equal_keys(keys):
            a, b = indices[a], indices[b]
            apart = self.parents[a] != self.parents[b]
            a, b = a[apart], b[apart]
            close = _ones(self.hashes[a] ^ self.hashes[b]) <= DISTANCE
            a, b = a[close], b[close]
            for i in range(0, len(a), _PAIRS):
                self._unite_alike(a[i : i + _PAIRS], b[i : i + _PAIRS])

    def _unite_alike(self, a: np.ndarray, b: np.ndarray) -> None:
        products = np.einsum("ij,ij->i", self.pixels[a], self.pixels[b], dtype=np.float32)
        covariance = products / self.pixels.shape[1] - self.mean[a] * self.mean[b]
        correlation = covariance / (self.deviation[a] * self.deviation[b])
        alike = correlation >= CORRELATION
        for x, y in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
            x, y = self._root(x), self._root(y)
            self.parents[max(x, y)] = min(x, y)
        while not np.array_equal(above := self.parents[self.parents], self.parents):
            self.parents = above

    def _root(self, i: int) -> int:
        while self.parents[i] != i:
            i = int(self.parents[i])
        return i


def _with_equal_keys(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs of indices whose keys are equal, in arrays of the first and the second."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.arange(len(order))
    step = 0
    while len(first):
        step += 1
        first = first[first + step < len(order)]
        first = first[ordered[first] == ordered[first + step]]
        if len(first):
            yield order[first], order[first + step]


def _ones(bits: np.ndarray) -> np.ndarray:
    """The number of ones in each uint64."""
    if hasattr(np, "bitwise_count"):  # since numpy 2
        return np.bitwise_count(bits)
    return np.unpackbits(bits.view(np.uint8).reshape(-1, 8), axis=1).sum(1)
