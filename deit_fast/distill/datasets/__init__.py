"""Labelled images on disk, read in any order: what training that resumes bit for bit needs.

    folders    a folder of images for each class, as ImageNet and ImageNet-V2 come
    tar        uncompressed .tar files: WebDataset samples (.cls or .json) or folders of classes
    parquet    Hugging Face datasets as .parquet files, or as `save_to_disk` leaves them
    table      .csv or .parquet files with the columns path, label and perhaps split
    idx        the MNIST family's files, .gz or not

`open_images` tells them apart by the files that are there. The order of images and classes depends
on names and contents alone, never on the order in which a file system lists them.
"""

from pathlib import Path

from .arrow import ArrowImages
from .folders import FolderImages
from .idx import IdxImages
from .image_set import SPLITS, ImageSet
from .layout import find_files
from .subset import Subset, fraction
from .table import TableImages
from .tars import TarImages

__all__ = ["SPLITS", "ImageSet", "Subset", "fraction", "has_split", "open_images"]


def open_images(
    path: str | Path, split: str | None = None, *, mode: str = "RGB",
    classes: list[str] | None = None, image_key: str = "image", label_key: str = "label",
) -> ImageSet:  # fmt: skip
    """Open the labelled images at `path`.

    Args:
        path: A folder or file of one of the kinds above.
        split: "train" or "validation", found by the names of subfolders or files in `path`, or by
            the column split of a table (`SPLITS`). None takes `path` as it is.
        mode: What images are converted to, "RGB" or "L".
        classes: The training set's, so that labels mean the same. Named classes must be exactly
            these; numbers must be less than how many there are.
        image_key: Column of a Hugging Face dataset; or of a table, if it has none named path.
        label_key: Column of a Hugging Face dataset or of a table, or key of a WebDataset .json.

    Returns:
        The images, of which only names and labels have been read, except for IDX files.

    Raises:
        FileNotFoundError: Nothing is at `path`.
        ValueError: The split, a label or a class is missing, a file is broken, or `path` could be
            read in two ways.
        RuntimeError: The package `datasets` or pyarrow is needed and missing.
    """
    path = Path(path)
    if mode not in ("RGB", "L"):
        raise ValueError(f'mode: {mode!r}, expected "RGB" or "L"')
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: {split!r}, expected one of {tuple(SPLITS)} or None")
    if not path.exists():
        raise FileNotFoundError(f"data {path}: no such file or folder")
    kind, path, files = find_files(path, split, image_key, label_key)
    if kind == "table":
        return TableImages(path, files, split, mode, classes, image_key, label_key)
    if kind == "saved":
        return ArrowImages(path, None, mode, classes, image_key, label_key)
    if kind == "parquet":
        return ArrowImages(path, files, mode, classes, image_key, label_key)
    if kind == "tar":
        return TarImages(path, files, mode, classes, label_key)
    if kind == "idx":
        return IdxImages(path, files, mode, classes)
    return FolderImages(path, files, mode, classes)


def has_split(
    path: str | Path, split: str, *, image_key: str = "image", label_key: str = "label"
) -> bool:
    """Whether `open_images(path, split, ...)` would find that split."""
    try:
        find_files(Path(path), split, image_key, label_key)
    except (ValueError, OSError):
        return False
    return True
