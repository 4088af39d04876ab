"""The MNIST family's IDX files, packed by gzip or not."""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from .image_set import ImageSet, data_error, listed, match_classes


class IdxImages(ImageSet):
    """An IDX file of images and the one of labels beside it, all pixels in memory."""

    def __init__(self, path: Path, files: list[Path], mode: str, classes: list[str] | None):
        plain = {file.name for file in files}
        files = [f for f in files if not (f.suffix == ".gz" and f.stem in plain)]
        if len(files) > 1:
            raise data_error(path, f"expected one file of images, there is {listed(files)}")
        self.path = file = files[0]
        stem = re.sub("-images(.)idx3", r"-labels\1idx1", file.name.removesuffix(".gz"))
        found = [f for f in (file.with_name(stem), file.with_name(f"{stem}.gz")) if f.is_file()]
        if not found:
            raise data_error(file, f"no labels for it, expected {stem} or {stem}.gz beside it")
        self.pixels = _read_idx(file, 3)  # uint8 (n, height, width)
        labels = _read_idx(found[0], 1).astype(np.int64)
        if len(labels) != len(self.pixels):
            raise data_error(
                found[0], f"{len(labels)} labels, expected {len(self.pixels)}, as many as images"
            )
        if not self.pixels.size:
            raise data_error(file, "no image")
        super().__init__(*match_classes(path, labels, None, classes, self.name), mode)

    def name(self, i: int) -> str:
        """The file of images and the place of image i in it."""
        return f"{self.path}: image {int(i)}"

    @contextmanager
    def stored(self, i: int) -> Iterator[Image.Image]:
        """Image i in grey; never unreadable."""
        yield Image.fromarray(self.pixels[i])


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file as uint8.

    Its format: bytes 0 0 8 d, then d sizes as big-endian uint32, then the content.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                content = packed.read()
        else:
            content = path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise data_error(path, f"no whole gzip file: {error}") from error
    magic, begin = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic:
        began = content[:4].hex() or "nothing"
        raise data_error(path, f"begins with {began}, expected {magic.hex()}")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4)]
    expected = begin + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise data_error(path, f"{len(content)} bytes, expected {expected} for the sizes {shape}")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)
