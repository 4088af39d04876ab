"""Tables of images: .csv or .parquet files with the columns path, label and perhaps split."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .image_set import (
    SPLIT_WORDS,
    SPLITS,
    ImageSet,
    data_error,
    labels_of_folders,
    listed,
    match_classes,
)

_DELIMITERS = ",;\t"  # what programs call CSV


class Rows(NamedTuple):
    """Rows of tables, one after the other."""

    paths: list[str]  # below the table's folder, or absolute
    labels: list[str]
    splits: list[str] | None  # a word of `SPLITS` each
    places: list[str]  # what an error calls each row


class TableImages(ImageSet):
    """The images that the rows of tables name, one label each, in their order.

    Args:
        path: What was opened.
        files: The tables. Paths in them are relative to the folder of each.
        split: "train" or "validation", by the column split. None: all rows.
        mode: See `open_images`.
        classes: See `open_images`.
        image_key: Column of paths, where there is none named path.
        label_key: Column of labels.
    """

    def __init__(
        self, path: Path, files: list[Path], split: str | None, mode: str,
        classes: list[str] | None, image_key: str, label_key: str,
    ):  # fmt: skip
        rows = read(files, image_key, label_key)
        if not rows.paths:
            raise data_error(path, f"no image in {listed(files)}")
        _require_one_label(rows)
        # Of all rows: a class that one split lacks is an error, as an empty folder is
        labels, names = labels_of_folders(path, rows.labels, ())
        here = np.arange(len(rows.paths))
        if split is not None and rows.splits is not None:
            word = split_word(set(rows.splits), split)
            here = np.flatnonzero([one == word for one in rows.splits])
            if without := sorted({*range(len(names))} - {*labels[here].tolist()}):
                some = listed([names[i] for i in without])
                raise data_error(path, f"no image in the split {word!r} of the class {some}")
        missing = [i for i in here if not os.path.isfile(rows.paths[i])]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            i = missing[0]
            raise data_error(rows.places[i], f"there is no file {rows.paths[i]}{more}")
        # Names in one array: each worker would come to copy a list of them.
        self.path, self.names = path, np.array([os.fsencode(rows.paths[i]) for i in here])
        super().__init__(*match_classes(path, labels[here], names, classes, self.name), mode)

    def name(self, i: int) -> str:
        """The path of image i."""
        return os.fsdecode(self.names[i])

    def _file(self, i: int) -> str:
        return self.name(i)


def is_table(file: Path, image_key: str, label_key: str) -> bool:
    """Whether a file has columns of paths and of labels; a damaged one has not.

    A .parquet file that holds the images themselves, as Hugging Face's do, is none.
    """
    try:
        columns = _parquet_columns(file) if _is_parquet(file) else _csv_header(file)[0]
    except (OSError, ValueError):
        return False
    return _path_column(columns, image_key) is not None and label_key in columns


def splits_of(files: list[Path], image_key: str, label_key: str) -> set[str] | None:
    """Which words of `SPLITS` tables name; None without a column split."""
    splits = read(files, image_key, label_key).splits
    return None if splits is None else set(splits)


def split_word(words: set[str], split: str) -> str | None:
    """The first word for a split, "train" or "validation", that is there."""
    return next((word for word in SPLITS[split] if word in words), None)


def read(files: list[Path], image_key: str, label_key: str) -> Rows:
    """Read tables.

    Raises:
        ValueError: A column is missing, a cell is empty, or a split has no known name.
        RuntimeError: A .parquet file needs pyarrow, which is missing.
    """
    rows = Rows([], [], [], [])
    for file in files:
        columns, cells = _read_parquet(file) if _is_parquet(file) else _read_csv(file)
        key = _path_column(columns, image_key)
        for column, there in (("path", key is not None), (label_key, label_key in columns)):
            if not there:
                found = ", ".join(columns) or "nothing"
                raise data_error(file, f"no column {column!r}, there is {found}")
        at_path, at_label = columns.index(str(key)), columns.index(label_key)
        at_split = columns.index("split") if "split" in columns else None
        for place, row in cells:
            if not row[at_path]:
                raise data_error(place, "no path")
            if not row[at_label]:
                raise data_error(place, "no label")
            rows.paths.append(os.path.join(file.parent, row[at_path]))
            rows.labels.append(row[at_label])
            rows.places.append(place)
            if at_split is not None and rows.splits is not None:
                rows.splits.append(_split(place, row[at_split]))
    split = rows.splits or []
    if split and len(split) < len(rows.paths):
        raise data_error(files[0].parent, f"only some of {listed(files)} have a column 'split'")
    return rows if split else rows._replace(splits=None)


def _split(place: str, name: str) -> str:
    if name.lower() not in SPLIT_WORDS:
        words = ", ".join(word for words in SPLITS.values() for word in words)
        raise data_error(place, f"split {name!r}, expected one of {words}")
    return name.lower()


def _require_one_label(rows: Rows) -> None:
    labels: dict[str, str] = {}
    for path, label, place in zip(rows.paths, rows.labels, rows.places, strict=True):
        if labels.setdefault(path, label) != label:
            both = f"{path} has the labels {labels[path]} and {label}, expected one of an image"
            raise data_error(place, both)


def _path_column(columns: list[str], image_key: str) -> str | None:
    return next((name for name in ("path", image_key) if name in columns), None)


_Cells = Iterable[tuple[str, list[str]]]  # what to call each row, and its cells


def _csv_header(file: Path) -> tuple[list[str], str]:
    """Names of the columns, and what is between them."""
    with open(file, encoding="utf-8-sig", newline="") as text:
        line = text.readline(1 << 16)
    delimiter = max(_DELIMITERS, key=line.count)
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])], delimiter


def _read_csv(file: Path) -> tuple[list[str], _Cells]:
    try:
        columns, delimiter = _csv_header(file)
        with open(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            next(reader, None)
            cells = []
            for row in reader:
                place = f"{file}, line {reader.line_num}"
                if row and len(row) != len(columns):
                    counts = f"{len(row)} cells, expected {len(columns)} as in the header"
                    raise data_error(place, counts)
                if row:
                    cells.append((place, [cell.strip() for cell in row]))
    except UnicodeDecodeError as error:
        raise data_error(file, f"is no UTF-8 text ({error.reason})") from error
    except csv.Error as error:
        raise data_error(file, f"is no CSV ({error})") from error
    return columns, cells


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _parquet_columns(file: Path) -> list[str]:
    """Names of the columns of a .parquet file of text and numbers; of another one none."""
    try:
        from pyarrow import lib, parquet, types
    except ImportError:
        return []
    try:
        schema = parquet.read_schema(file)
    except lib.ArrowException:
        return []
    if any(types.is_nested(f.type) or "binary" in str(f.type) for f in schema):
        return []
    return list(schema.names)


def _read_parquet(file: Path) -> tuple[list[str], _Cells]:
    try:
        from pyarrow import lib, parquet
    except ImportError as error:
        needed = f"data {file}: needs the package pyarrow: pip install 'deit_fast[parquet]'"
        raise RuntimeError(needed) from error
    try:
        table = parquet.read_table(file)
    except lib.ArrowException as error:
        raise data_error(file, f"can't be read: {error}") from error
    columns = [["" if x is None else str(x).strip() for x in c.to_pylist()] for c in table.columns]
    rows = zip(*columns, strict=True)
    return table.column_names, [(f"{file}, row {i}", list(row)) for i, row in enumerate(rows)]
