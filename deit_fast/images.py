"""From paths to pixels: finding images, and decoding them in worker processes.

A decoder applies timm's evaluation transform for the model, except the normalization: it returns
uint8 (H, W, C), a quarter of the bytes, which the patch embedding kernel normalizes.
"""

import glob
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

SUFFIXES = frozenset(
    ".bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp .avif".split()
)
LISTS = (".txt", ".lst", ".list")
CHUNK = 16  # images that a worker decodes at a time: small, so that few images use all workers
SORTED = 100_000  # names of a folder that are sorted at once, which bounds the memory
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_T = TypeVar("_T", str, tuple[str, bool])


class Decoder:
    """`decoder(path or file object)` -> uint8 (H, W, C). Raises `Unreadable`.

    Args:
        config: timm's data configuration (`deit_fast.engine.data_config(model)`).

    Raises:
        ValueError: For images with a number of channels that Pillow has no mode for.
    """

    def __init__(self, config: dict[str, Any]):
        channels, *size = config["input_size"]
        if channels not in _MODES:
            raise ValueError(f"config: {channels} channels, expected one of {tuple(_MODES)}")
        self.mode = _MODES[channels]
        self.resized = max(size) / (config.get("crop_pct") or 1)
        # as in timm's own loader: without the normalization, which the device does
        self.transform = timm.data.create_transform(**config, use_prefetcher=True)

    def __call__(self, file: str | os.PathLike | IO[bytes]) -> np.ndarray:
        """Decode, resize and crop one image.

        Args:
            file: A path, or a binary file object.

        Returns:
            The pixels, uint8 (H, W, C).

        Raises:
            Unreadable: For a file that can't be decoded, or not resized.
        """
        with opened(file) as stored:
            image = convert(stored, self.mode)
        narrow, wide = sorted(image.size)
        if wide / narrow * self.resized**2 > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Unreadable(f"{image.width} x {image.height} pixels are too narrow to be resized")
        return np.ascontiguousarray(np.asarray(self.transform(image)).transpose(1, 2, 0))


class Unreadable(ValueError):
    """A file that can't be decoded as an image; the message is the reason, in one line."""


@contextmanager
def opened(file: str | os.PathLike | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image, as it is stored; its pixels are decoded when they are asked for.

    Args:
        file: A path, or a binary file object.

    Raises:
        Unreadable: It can't be opened, or what is done with it inside the `with` fails.
    """
    if isinstance(file, str | os.PathLike) and not os.path.isfile(file):
        raise Unreadable(_what(file))  # opening a pipe would block
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which is not used
            with Image.open(file) as image:
                yield image
    except Unreadable:
        raise
    except Exception as error:  # decoders raise anything for a broken file
        raise Unreadable(_reason(file, error)) from error


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8 bits a channel.

    Alpha is dropped, as timm and torchvision do: what is transparent gets the colour that is stored
    for it. Of 16 bits the upper 8 are taken, as Pillow does with colour; its own conversion of grey
    would turn all above 255 white.

    Args:
        image: As it is stored.
        mode: "L", "RGB" or "RGBA".

    Raises:
        Unreadable: Its pixels are floats, of 32 bits or signed: nothing says what is white.
    """
    of_16_bits = image.mode == "I" and image.format in ("PNG", "PPM")  # called so by Pillow
    if image.mode in ("I", "F") and not of_16_bits:
        raise Unreadable(f"has pixels of mode {image.mode}, expected 8 or 16 bits, unsigned")
    if image.mode.startswith("I"):
        upper = np.asarray(image).astype(np.int32) >> 8
        image = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def _what(path: str | os.PathLike) -> str:
    if not os.path.exists(path):
        return "no such file"
    return "is a folder" if os.path.isdir(path) else "is no regular file"


def _reason(file: object, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"
    said = str(error).replace(repr(str(file)), "").replace(repr(os.path.realpath(str(file))), "")
    return " ".join(said.split()) or type(error).__name__


def find(inputs: Iterable[str | Path]) -> Iterator[str]:
    """Find the paths of images, in a fixed order, without holding all of them in memory.

    Args:
        inputs: Each is a folder (searched with its subfolders for `SUFFIXES`), a pattern such as
            "photos/**/*.jpg", a list (`LISTS`: one path a line, relative to the working directory),
            or an image. A path that a pattern, a list or the input itself names is taken with any
            suffix.

    Yields:
        The paths.

    Raises:
        FileNotFoundError: For an input that is no file, folder or pattern.
        OSError: For a folder that can't be read.
    """
    for one in map(str, inputs):
        path = Path(one)
        if path.is_dir():
            yield from _walk(one, ())
        elif path.suffix.lower() in LISTS:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
                yield from (line.rstrip("\r\n") for line in lines if line.strip())
        elif path.exists():
            yield one
        elif glob.has_magic(one):
            matches = glob.iglob(one, recursive=True)
            yield from _sorted(m for m in matches if not os.path.isdir(m) and not _loops(m))
        elif path.suffix.lower() in SUFFIXES:
            yield one  # reported with the unreadable ones
        else:
            raise FileNotFoundError(f"no image, folder, pattern or list {one}")


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yield the images in `folder`, then those in its subfolders.

    `above` are the folders on the way, so that a link to one of them is not followed.
    """
    identity = _identity(folder)
    if identity in above:
        return
    folders = []
    with os.scandir(folder) as entries:
        for name, is_folder in _sorted((entry.name, _is_folder(entry)) for entry in entries):
            path = os.path.join(folder, name)
            if is_folder:
                folders.append(path)
            elif os.path.splitext(name)[1].lower() in SUFFIXES:
                yield path
    for path in folders:
        yield from _walk(path, (*above, identity))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that can't be read
        return False


def _loops(path: str) -> bool:
    """Return whether a path goes through the same folder twice, by a link to one above it."""
    folders = [_identity(str(folder)) for folder in Path(path).parents]
    return len(set(folders)) < len(folders)


@lru_cache(maxsize=1024)
def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _sorted(items: Iterable[_T]) -> Iterator[_T]:
    """Sort `SORTED` items at a time."""
    items = iter(items)
    while chunk := sorted(islice(items, SORTED)):
        yield from chunk


Decoded = tuple[list[str], list[str | None], np.ndarray]
_Item = tuple[str, str | None, np.ndarray | None]


class _Files(Dataset):
    def __init__(self, decoder: Callable):
        self.decoder = decoder

    def __getitem__(self, path: str) -> _Item:
        try:
            return path, None, self.decoder(path)
        except Unreadable as error:
            return path, str(error), None


def decode(
    paths: Iterable[str], decoder: Callable, workers: int, chunk: int = CHUNK
) -> Iterator[Decoded]:
    """Decode images in worker processes, a few chunks ahead of the caller.

    Args:
        paths: The images.
        decoder: A `Decoder`, or a function like it.
        workers: The number of processes; 0: decode in this one.
        chunk: Images that a worker decodes at a time.

    Yields:
        In the order of `paths`: up to `chunk` paths, for each the reason why it is unreadable or
        None, and the readable ones' pixels, uint8 (n, H, W, C).
    """
    paths = iter(paths)
    sampler: Any = iter(lambda: list(islice(paths, chunk)), [])  # batches of paths, not of indices
    loader = DataLoader(
        _Files(decoder),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=begin_worker,
    )
    yield from loader


def begin_worker(worker: int) -> None:
    """Prepare a worker process of a DataLoader: signals and threads."""
    os.setsid()  # signals to the group (Ctrl-C, torchrun's) are the main process's to handle
    torch.set_num_threads(1)


def _collate(items: list[_Item]) -> Decoded:
    """Stack to numpy arrays: tensors would need shared memory, of which containers have little."""
    paths, reasons, pixels = zip(*items, strict=True)
    readable = [p for p in pixels if p is not None]
    stacked = np.stack(readable) if readable else np.empty((0, 0, 0, 0), np.uint8)
    return list(paths), list(reasons), stacked
