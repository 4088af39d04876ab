"""A folder of images for each class."""

import os
from pathlib import Path

import numpy as np
from timm.data.readers.reader_image_folder import find_images_and_targets

from deit_fast.images import SUFFIXES

from .image_set import ImageSet, data_error, labels_of_folders, listed, match_classes, natural_order


class FolderImages(ImageSet):
    """The images PATH/CLASS/NAME, by class and then by name, in natural order."""

    def __init__(self, path: Path, files: list[Path], mode: str, classes: list[str] | None):
        # Unsorted: timm's order of names such as a1.png and A1.png is the file system's.
        found, _ = find_images_and_targets(str(path), types=SUFFIXES, sort=False)
        names = [file[len(os.path.join(path, "")) :] for file, _ in found]
        names = sorted((n for n in names if "/." not in f"/{n}"), key=natural_order)
        if not names:
            raise data_error(path, f"no image in {listed(files)}")
        if odd := [name for name in names if name.count("/") != 1]:
            raise data_error(path, f"{odd[0]} is not in the folder of a class, expected CLASS/NAME")
        folders = [name.partition("/")[0] for name in names]
        labels, known = labels_of_folders(path, folders, [folder.name for folder in files])
        order = np.argsort(labels, kind="stable")  # Bee before bee, as classes go, not bee/1, Bee/2
        # Names in one array: each worker would come to copy a list of them.
        self.path, self.names = path, np.array([os.fsencode(name) for name in names])[order]
        super().__init__(*match_classes(path, labels[order], known, classes, self.name), mode)

    def name(self, i: int) -> str:
        """The path of image i."""
        return os.path.join(self.path, os.fsdecode(self.names[i]))

    def _file(self, i: int) -> str:
        return self.name(i)
