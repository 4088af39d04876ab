"""Uncompressed .tar files: WebDataset samples or folders of classes."""

import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deit_fast.images import SUFFIXES

from .image_set import ImageSet, data_error, labels_of_folders, listed, match_classes

OPEN_FILES = 128  # tar files a process holds open: processes are often allowed 1024


class TarImages(ImageSet):
    """The images of tar files, by an index of where each begins and how long it is."""

    def __init__(
        self, path: Path, files: list[Path], mode: str, classes: list[str] | None, label_key: str
    ):
        self.paths = [str(file) for file in files]
        self._open: dict[int, io.FileIO] = {}
        images: list[tuple[int, str, int, int]] = []
        given: list[int | str] = []
        folders: set[str] = set()
        for number, file in enumerate(self.paths):
            scanned = _scan(file, label_key)
            images += [(number, *image) for image in scanned.images]
            given += scanned.labels
            folders.update(scanned.folders)
        if not images:
            raise data_error(path, f"no image in {listed(files)}")
        numbers, members, offsets, sizes = zip(*images, strict=True)
        self.members = np.array([os.fsencode(member) for member in members])
        self.places = np.array([numbers, offsets, sizes], np.int64).T
        if odd := [i for i, label in enumerate(given) if type(label) is not type(given[0])]:
            reason = "its label is {!r}, but that of {} {!r}: one is a number, one a folder"
            reason = reason.format(given[odd[0]], self.name(0), given[0])
            raise data_error(self.name(odd[0]), reason)
        known = None
        if isinstance(given[0], str):
            labels, known = labels_of_folders(path, [str(label) for label in given], folders)
        else:
            labels = np.array(given, np.int64)
        super().__init__(*match_classes(path, labels, known, classes, self.name), mode)

    def name(self, i: int) -> str:
        """The tar file and the member of image i."""
        return f"{self.paths[self.places[i][0]]}: {os.fsdecode(self.members[i])}"

    def _file(self, i: int) -> io.BytesIO:
        number, offset, size = self.places[i].tolist()
        file = self._open.get(number)
        if file is None:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            file = self._open[number] = open(self.paths[number], "rb", buffering=0)
        # pread: a forked worker shares this process's files, and with them the position in each.
        return io.BytesIO(os.pread(file.fileno(), size, offset))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}


class _Scan(NamedTuple):
    """What is in one tar file."""

    images: list[tuple[str, int, int]]  # member, offset, size
    labels: list  # of each image: int of a WebDataset sample, or str of a folder
    folders: Iterable[str]  # of classes


def _scan(path: str, label_key: str) -> _Scan:
    images: list[tuple[str, int, int]] = []
    keys: list[str] = []
    labelled: dict[str, dict[str, tuple[int, int]]] = {".cls": {}, ".json": {}}
    folders: list[tuple[str, str]] = []
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # which it would keep: a million of them are gigabytes
                    tar.members = []  # type: ignore[attr-defined]  # not in typeshed
                    name = posixpath.normpath(member.name)
                    folder, base = posixpath.split(name)
                    suffix = posixpath.splitext(base)[1].lower()
                    if member.isdir():
                        folders.append((folder, base))
                    elif base.startswith("."):
                        continue
                    elif suffix in SUFFIXES and (not member.isreg() or member.issparse()):
                        raise data_error(path, f"{name}: is a link or sparse")
                    elif suffix in SUFFIXES:
                        images.append((name, member.offset_data, member.size))
                        keys.append(posixpath.join(folder, base.split(".")[0]))
                    elif suffix in labelled:
                        key = posixpath.join(folder, base.split(".")[0])
                        labelled[suffix][key] = member.size, member.offset_data
        except tarfile.TarError as error:
            raise data_error(path, f"no whole uncompressed tar file: {error}") from error
        # tarfile takes whatever is no member for the end: a cut, or the next of joined archives.
        file.seek(tar.offset)
        rest = file.read(1 << 16)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            what = "something else follows its end" if any(rest) else "its end is missing"
            raise data_error(path, f"no whole uncompressed tar file: {what}, at byte {tar.offset}")
        if labelled[".cls"] or not labelled[".json"].keys().isdisjoint(keys):
            labels = _sample_labels(path, file.fileno(), keys, labelled, label_key)
            return _Scan(images, labels, ())
    return _Scan(images, *_folder_labels(path, [name for name, *_ in images], folders))


def _sample_labels(
    path: str,
    descriptor: int,
    keys: list[str],
    labelled: dict[str, dict[str, tuple[int, int]]],
    label_key: str,
) -> list[int]:
    """Labels of WebDataset samples, by their keys."""
    labels = []
    for key in keys:
        suffix = ".cls" if key in labelled[".cls"] else ".json"
        if key not in labelled[suffix]:
            raise data_error(path, f"{key}: no label, expected {key}.cls or {key}.json")
        try:
            text = os.pread(descriptor, *labelled[suffix][key])
            label = int(text) if suffix == ".cls" else json.loads(text)[label_key]
        except (ValueError, TypeError, KeyError):
            label = None
        if type(label) is not int:
            where = suffix if suffix == ".cls" else f"{suffix} under {label_key!r}"
            raise data_error(path, f"{key}: no label, expected an integer in its {where}")
        labels.append(label)
    if len(keys) > len(set(keys)):
        twice = next(key for key, after in pairwise(sorted(keys)) if key == after)
        raise data_error(path, f"{twice}: two images in one sample")
    if alone := sorted(labelled[".cls"].keys() - set(keys)):
        raise data_error(path, f"{alone[0]}: a label without an image")
    return labels


def _folder_labels(
    path: str, names: list[str], folders: list[tuple[str, str]]
) -> tuple[list[str], set[str]]:
    """The folder of each image, and all folders of classes."""
    parts = [posixpath.split(posixpath.dirname(name)) for name in names]
    above = parts[0][0] if parts else ""
    for name, (folder, label) in zip(names, parts, strict=True):
        if not label or folder != above:  # another folder: perhaps another split
            raise data_error(path, f"{name}: no label, expected CLASS/NAME, .cls or .json")
    known = {base for folder, base in folders if folder == above and base != "."}
    return [label for _, label in parts], known
