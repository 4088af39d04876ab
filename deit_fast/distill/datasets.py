"""Labelled images on disk, read in any order: what training that resumes bit for bit needs.

    folders    a folder of images for each class, as ImageNet and ImageNet-V2 come
    tar        uncompressed .tar files: WebDataset samples (.cls or .json) or folders of classes
    parquet    Hugging Face datasets as .parquet files, or as (saved) `save_to_disk` leaves them
    idx        the MNIST family's files, .gz or not

`open_images` sees from what is there which of them it is. The order of images and classes depends
on names and contents alone, never on the order in which a file system lists them.
"""

import gzip
import io
import json
import os
import posixpath
import re
import tarfile
import warnings
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from ..images import SUFFIXES, Unreadable, _reason, _what

# What a split's folders and files may be called: the first that is there is taken.
SPLITS = {"train": ("train",), "validation": ("val", "validation", "valid", "test", "t10k")}
OPEN_FILES = 128  # tar files a process holds open: processes are often allowed 1024
_WORDS = {word for words in SPLITS.values() for word in words}
_IDX = re.compile(r".*-images[-.]idx3-ubyte(\.gz)?")


class ImageSet:
    """Labelled images. classes: names, in index order. labels: int64 (n,), each an index of
    classes. mode: what images are converted to, "RGB" or "L".

    Can be pickled and used after a fork: files are opened by the process that reads them.
    """

    def __init__(self, classes: list[str], labels: np.ndarray, mode: str):
        self.classes, self.labels, self.mode = classes, labels, mode

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What an error message calls image i."""
        raise NotImplementedError

    def image(self, i: int) -> Image.Image:
        """Image i, in `mode`. Raises `Unreadable`, saying why, if it can't be decoded."""
        file = self._file(i)
        if file is None:
            raise Unreadable("there is no image")
        if isinstance(file, str) and not os.path.isfile(file):
            raise Unreadable(_what(file))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata: the pixels are what counts
                with Image.open(file) as opened:
                    return opened.convert(self.mode)
        except Exception as error:  # a broken file makes a decoder raise anything
            raise Unreadable(_reason(file, error)) from error

    def _file(self, i):
        """A path, a file object, or None."""
        raise NotImplementedError


def open_images(
    path: str | Path, split: str | None = None, *, mode: str = "RGB",
    classes: list[str] | None = None, image_key: str = "image", label_key: str = "label",
) -> ImageSet:  # fmt: skip
    """The labelled images at `path`.

    split: "train" or "validation", found by the names of subfolders or files in `path` (`SPLITS`);
    None takes `path` as it is. mode: "RGB" or "L". classes: the training set's, so that labels mean
    the same: named classes must be exactly these, numbers less than how many there are. image_key,
    label_key: columns of a Hugging Face dataset; label_key also is a WebDataset .json's key.

    Raises FileNotFoundError where nothing is at `path`, ValueError for what is not there, not
    labelled, broken, or could be read in two ways, and RuntimeError where the package `datasets` is
    needed and missing.
    """
    path = Path(path)
    if mode not in ("RGB", "L"):
        raise ValueError(f'mode: {mode!r}, expected "RGB" or "L"')
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: {split!r}, expected one of {tuple(SPLITS)} or None")
    if not path.exists():
        raise FileNotFoundError(f"data {path}: no such file or folder")
    kind, path, files = _choose(path, split)
    return _KINDS[kind](path, files, mode, classes, image_key, label_key)


def has_split(path: str | Path, split: str) -> bool:
    """Whether `open_images(path, split)` would find that split."""
    try:
        _choose(Path(path), split)
    except (ValueError, OSError):
        return False
    return True


def fraction(images: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` of the images, drawn at random and spread over the classes as evenly as they allow.

    Images keep their order. With the same seed a smaller fraction is a part of a larger one.
    Raises ValueError for a count out of 1..len(images).
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
    return _Fraction(images, np.sort(order[np.argsort(rank, kind="stable")[:count]]))


class _Fraction(ImageSet):
    def __init__(self, images, indices):
        super().__init__(images.classes, images.labels[indices], images.mode)
        self.images, self.indices = images, indices

    def name(self, i):
        return self.images.name(self.indices[i])

    def image(self, i):
        return self.images.image(self.indices[i])


def _wrong(path, said):
    return ValueError(f"data {path}: {said}")


def _choose(path, split):
    """(kind, path, files or None): what of `path` is meant."""
    found = _found(path)
    many = {kind: files for kind, files in found.items() if kind in ("tar", "parquet", "idx")}
    for word in SPLITS.get(split, ()):
        here = {kind: [f for f in files if word in _words(f)] for kind, files in many.items()}
        here["folders"] = [path / word] if (path / word).is_dir() else []
        here = [(kind, files) for kind, files in here.items() if files]
        if len(here) > 1:
            both = " and ".join(_some(files) for _, files in here)
            raise _wrong(path, f"the split {word} could be {both}")
        for kind, files in here:
            return _choose(files[0], None) if kind == "folders" else (kind, path, files)
    there = _some(sorted(path.iterdir())) if path.is_dir() else "one file"
    if split is not None:
        names = ", ".join(SPLITS[split])
        raise _wrong(path, f"no split {split!r} (named {names}), there is {there}")
    if (path / "dataset_dict.json").exists():
        raise _wrong(path, f"holds splits, say which, there is {there}")
    if not found:
        expected = "folders of classes, .tar or .parquet files, a save_to_disk folder, or IDX files"
        raise _wrong(path, f"nothing recognised, looked for {expected}, there is {there}")
    if len(found) > 1:
        both = " and ".join(f"{kind} ({_some(files)})" for kind, files in found.items())
        raise _wrong(path, f"can be read in more than one way: {both}")
    kind, files = found.popitem()
    splits = sorted({word for file in many.get(kind, ()) for word in _words(file)} & _WORDS)
    if len(splits) > 1:
        raise _wrong(path, f"holds the splits {', '.join(splits)}: say which")
    return kind, path, files


def _found(path):
    """{kind: files} of what lies at `path`; "folders" stands for its subfolders."""
    if (path / "state.json").exists():
        return {"saved": None}
    entries = [path] if path.is_file() else [e for e in path.iterdir() if e.name[0] != "."]
    entries.sort(key=lambda entry: _natural(entry.name))
    found = {"tar": [], "parquet": [], "idx": [], "folders": []}
    for entry in entries:
        kind = "idx" if _IDX.fullmatch(entry.name) else entry.suffix.lower()[1:]
        kind = "folders" if entry.is_dir() else kind
        if kind in found:
            found[kind].append(entry)
    return {kind: files for kind, files in found.items() if files}


def _words(file):
    """Of "imagenet1k-train-0000.tar": imagenet1k, train, 0000, tar."""
    return set(re.split(r"[\W_]+", file.name.lower()))


def _natural(name):
    return natural_key(name), name  # natural_key alone takes a1, A1 and a01 for the same


def _some(items):
    """Up to eight names, and how many more there are."""
    names = [item.name if isinstance(item, Path) else item for item in items]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more


def _by_folder(path, folder_of, folders):
    """(int64 labels, names of classes) of images in folders, which all must have one."""
    names = sorted({*folder_of, *folders}, key=_natural)
    if empty := sorted(set(folders).difference(folder_of), key=_natural):
        raise _wrong(path, f"no image in the folder of the class {_some(empty)}")
    if all(name.isascii() and name.isdigit() for name in names):
        # As ImageNet-V2's: one left out would shift those after it.
        if missing := sorted(set(range(len(names))) - set(map(int, names))):
            raise _wrong(path, f"classes are numbers from 0, but there is no {missing[0]}")
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[folder] for folder in folder_of], np.int64), names


def _agreed(path, labels, names, classes, name):
    """(classes, labels) as an ImageSet has them. labels: int64; names: of classes, None: numbers;
    classes: the wanted ones or None; name(i): what to call image i."""
    if names is not None:
        count = len(names)
    else:
        count = int(labels.max()) + 1 if classes is None else len(classes)
    bad = np.flatnonzero((labels < 0) | (labels >= count))
    if len(bad):
        said = f"label {labels[bad[0]]}, but classes are numbered from 0, and there are {count}"
        raise _wrong(name(bad[0]), said)
    if names is None:
        return list(map(str, range(count)) if classes is None else classes), labels
    if classes is None:
        return list(names), labels
    missing = sorted({*classes} - {*names}, key=_natural)
    extra = sorted({*names} - {*classes}, key=_natural)
    if missing or extra:
        said = f"not the same classes: missing {_some(missing)}; extra {_some(extra)}"
        raise _wrong(path, said)
    place = {name: index for index, name in enumerate(classes)}
    return list(classes), np.array([place[name] for name in names], np.int64)[labels]


class _Folders(ImageSet):
    def __init__(self, path, files, mode, classes, image_key, label_key):
        # Unsorted: timm's order of names such as a1.png and A1.png is the file system's.
        found, _ = find_images_and_targets(str(path), types=SUFFIXES, sort=False)
        names = [file[len(os.path.join(path, "")) :] for file, _ in found]
        names = sorted((n for n in names if "/." not in f"/{n}"), key=_natural)
        if not names:
            raise _wrong(path, f"no image in {_some(files)}")
        if odd := [name for name in names if name.count("/") != 1]:
            raise _wrong(path, f"{odd[0]} is not in the folder of a class, expected CLASS/NAME")
        folders = [name.partition("/")[0] for name in names]
        labels, known = _by_folder(path, folders, [folder.name for folder in files])
        order = np.argsort(labels, kind="stable")  # Bee before bee, as classes go, not bee/1, Bee/2
        # Names in one array: each worker would come to copy a list of them.
        self.path, self.names = path, np.array([os.fsencode(name) for name in names])[order]
        super().__init__(*_agreed(path, labels[order], known, classes, self.name), mode)

    def name(self, i):
        return os.path.join(self.path, os.fsdecode(self.names[i]))

    _file = name


class _Tars(ImageSet):
    """The images of tar files, by an index of where each begins and how long it is."""

    def __init__(self, path, files, mode, classes, image_key, label_key):
        self.paths, self._open = [str(file) for file in files], {}
        images, labels, folders = [], [], set()
        for number, file in enumerate(self.paths):
            found, found_labels, found_folders = _scan(file, label_key)
            images += [(number, *image) for image in found]
            labels += found_labels
            folders.update(found_folders)
        if not images:
            raise _wrong(path, f"no image in {_some(files)}")
        numbers, members, offsets, sizes = zip(*images, strict=True)
        self.members = np.array([os.fsencode(member) for member in members])
        self.places = np.array([numbers, offsets, sizes], np.int64).T
        if odd := [i for i, label in enumerate(labels) if type(label) is not type(labels[0])]:
            said = "its label is {!r}, but that of {} {!r}: one is a number, one a folder"
            raise _wrong(self.name(odd[0]), said.format(labels[odd[0]], self.name(0), labels[0]))
        if isinstance(labels[0], str):
            labels, known = _by_folder(path, labels, folders)
        else:
            labels, known = np.array(labels, np.int64), None
        super().__init__(*_agreed(path, labels, known, classes, self.name), mode)

    def name(self, i):
        return f"{self.paths[self.places[i][0]]}: {os.fsdecode(self.members[i])}"

    def _file(self, i):
        number, offset, size = self.places[i].tolist()
        file = self._open.get(number)
        if file is None:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            file = self._open[number] = open(self.paths[number], "rb", buffering=0)
        # pread: a forked worker shares this process's files, and with them the position in each.
        return io.BytesIO(os.pread(file.fileno(), size, offset))

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}


def _scan(path, label_key):
    """Of one tar: [(member, offset, size)] of its images, the label of each (int of WebDataset, str
    of a folder) and the names of folders of classes."""
    images, keys, labelled, folders = [], [], {".cls": {}, ".json": {}}, []
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # which it would keep: a million of them are gigabytes
                    name = posixpath.normpath(member.name)
                    folder, base = posixpath.split(name)
                    suffix = posixpath.splitext(base)[1].lower()
                    if member.isdir():
                        folders.append((folder, base))
                    elif base.startswith("."):
                        continue
                    elif suffix in SUFFIXES and (not member.isreg() or member.issparse()):
                        raise _wrong(path, f"{name}: is a link or sparse")
                    elif suffix in SUFFIXES:
                        images.append((name, member.offset_data, member.size))
                        keys.append(posixpath.join(folder, base.split(".")[0]))
                    elif suffix in labelled:
                        key = posixpath.join(folder, base.split(".")[0])
                        labelled[suffix][key] = member.size, member.offset_data
        except tarfile.TarError as error:
            raise _wrong(path, f"no whole uncompressed tar file: {error}") from error
        # tarfile takes whatever is no member for the end: a cut, or the next of joined archives.
        file.seek(tar.offset)
        rest = file.read(1 << 16)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            what = "something else follows its end" if any(rest) else "its end is missing"
            raise _wrong(path, f"no whole uncompressed tar file: {what}, at byte {tar.offset}")
        if labelled[".cls"] or not labelled[".json"].keys().isdisjoint(keys):
            return images, _sample_labels(path, file.fileno(), keys, labelled, label_key), ()
    return images, *_folder_labels(path, [name for name, *_ in images], folders)


def _sample_labels(path, descriptor, keys, labelled, label_key):
    labels = []
    for key in keys:
        suffix = ".cls" if key in labelled[".cls"] else ".json"
        if key not in labelled[suffix]:
            raise _wrong(path, f"{key}: no label, expected {key}.cls or {key}.json")
        try:
            text = os.pread(descriptor, *labelled[suffix][key])
            label = int(text) if suffix == ".cls" else json.loads(text)[label_key]
        except (ValueError, TypeError, KeyError):
            label = None
        if type(label) is not int:
            where = suffix if suffix == ".cls" else f"{suffix} under {label_key!r}"
            raise _wrong(path, f"{key}: no label, expected an integer in its {where}")
        labels.append(label)
    if len(keys) > len(set(keys)):
        twice = next(key for key, after in pairwise(sorted(keys)) if key == after)
        raise _wrong(path, f"{twice}: two images in one sample")
    if alone := sorted(labelled[".cls"].keys() - set(keys)):
        raise _wrong(path, f"{alone[0]}: a label without an image")
    return labels


def _folder_labels(path, names, folders):
    parts = [posixpath.split(posixpath.dirname(name)) for name in names]
    above = parts[0][0] if parts else ""
    for name, (folder, label) in zip(names, parts, strict=True):
        if not label or folder != above:  # another folder: perhaps another split
            raise _wrong(path, f"{name}: no label, expected CLASS/NAME, .cls or .json")
    known = {base for folder, base in folders if folder == above and base != "."}
    return [label for _, label in parts], known


class _Arrow(ImageSet):
    """A Hugging Face dataset, memory-mapped; files None: of save_to_disk, else .parquet."""

    def __init__(self, path, files, mode, classes, image_key, label_key):
        try:
            import datasets
        except ImportError as error:
            said = f"data {path}: needs the package datasets: pip install 'deit_fast[train]'"
            raise RuntimeError(said) from error
        try:
            if files is None:
                data = datasets.load_from_disk(str(path))
            else:
                files = [str(file) for file in files]
                data = datasets.load_dataset("parquet", data_files=files, split="train")
        except (datasets.exceptions.DatasetsError, ValueError, IndexError) as error:
            # IndexError: what load_from_disk makes of a dataset without a row
            raise _wrong(path, f"can't be read: {error.__cause__ or error}") from error
        for option, key in (("image_key", image_key), ("label_key", label_key)):
            if key not in data.column_names:
                there = ", ".join(data.column_names)
                raise _wrong(path, f"{option}: no column {key!r}, there is {there}")
        if not len(data):
            raise _wrong(path, "no image")
        image, label = data.features[image_key], data.features[label_key]
        self.path, self.key, self.data = path, image_key, data.select_columns([image_key])
        if isinstance(image, datasets.Image):  # decode=False: errors of decoding are ours to report
            self.data = self.data.cast_column(image_key, datasets.Image(decode=False))
        elif not (isinstance(image, dict) and "bytes" in image or "binary" in str(image)):
            raise _wrong(path, f"image_key: {image_key!r} holds {image}, expected images")
        names = label.names if isinstance(label, datasets.ClassLabel) else None
        if names is None and not re.match("u?int", getattr(label, "dtype", None) or ""):
            raise _wrong(path, f"label_key: {label_key!r} holds {label}, expected integers")
        labels = data.select_columns([label_key]).with_format("arrow")[:][label_key]
        if labels.null_count:
            raise _wrong(self.name(labels.is_null().to_pylist().index(True)), "no label")
        labels = labels.to_numpy().astype(np.int64)
        super().__init__(*_agreed(path, labels, names, classes, self.name), mode)

    def name(self, i):
        return f"{self.path}: image {int(i)}"

    def _file(self, i):
        value = self.data[int(i)][self.key]
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        return io.BytesIO(value) if isinstance(value, bytes) else value


class _Idx(ImageSet):
    """All pixels in memory, uint8 (n, height, width)."""

    def __init__(self, path, files, mode, classes, image_key, label_key):
        plain = {file.name for file in files}
        files = [f for f in files if not (f.suffix == ".gz" and f.stem in plain)]
        if len(files) > 1:
            raise _wrong(path, f"one file of images is wanted, there is {_some(files)}")
        self.path = file = files[0]
        stem = re.sub("-images(.)idx3", r"-labels\1idx1", file.name.removesuffix(".gz"))
        found = [f for f in (file.with_name(stem), file.with_name(f"{stem}.gz")) if f.is_file()]
        if not found:
            raise _wrong(file, f"no labels for it, expected {stem} or {stem}.gz beside it")
        self.pixels, labels = _read_idx(file, 3), _read_idx(found[0], 1).astype(np.int64)
        if len(labels) != len(self.pixels):
            raise _wrong(
                found[0], f"{len(labels)} labels, expected {len(self.pixels)}, as many as images"
            )
        if not self.pixels.size:
            raise _wrong(file, "no image")
        super().__init__(*_agreed(path, labels, None, classes, self.name), mode)

    def name(self, i):
        return f"{self.path}: image {int(i)}"

    def image(self, i):
        return Image.fromarray(self.pixels[i]).convert(self.mode)


def _read_idx(path, dimensions):
    """uint8 array of an IDX file: bytes 0 0 8 d, d sizes as big-endian uint32, then the content."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _wrong(path, f"no whole gzip file: {error}") from error
    magic, begin = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic:
        raise _wrong(path, f"begins with {content[:4].hex() or 'nothing'}, expected {magic.hex()}")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4)]
    expected = begin + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise _wrong(path, f"{len(content)} bytes, expected {expected} for the sizes {shape}")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


_KINDS = {"folders": _Folders, "tar": _Tars, "parquet": _Arrow, "saved": _Arrow, "idx": _Idx}
