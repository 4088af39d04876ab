"""The formats of result files, each converted from what a job has saved while it ran."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMATS = {False: (".csv", ".jsonl", ".parquet"), True: (".npy", ".parquet")}  # by `embed`
NPY_HEADER = 128  # bytes of an .npy file before the rows
_CHUNK = 4096  # rows that a conversion holds in memory at a time


class Saved(NamedTuple):
    """What a complete job has saved.

    Attributes:
        out: The path of the result file.
        folder: The folder with rows.jsonl and features.npy.
        embed: Whether features.npy holds embeddings.
        topk: Classes per image.
        width: Features per embedding; 0 if no image is readable.
        readable: How many images are readable.
        unknown: Whether rows say of images that they are unknown.
    """

    out: Path
    folder: Path
    embed: bool
    topk: int
    width: int
    readable: int
    unknown: bool = False

    def chunks(self) -> Iterator[list[dict]]:
        """Yield the rows, some thousands at a time."""
        with open(self.folder / "rows.jsonl", "rb") as lines:
            rows = map(json.loads, lines)
            yield from iter(lambda: list(islice(rows, _CHUNK)), [])


def check_output(out: str | Path, embed: bool, overwrite: bool) -> None:
    """Check that a result file can be written, before anything is computed.

    Args:
        out: Its path, whose suffix says the format.
        embed: Whether it is to hold embeddings instead of classes.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ValueError: For a format that does not fit, or whose library is not installed.
        FileNotFoundError: If the folder does not exist.
        PermissionError: If the folder is not writable.
        FileExistsError: If the file exists, unless `overwrite`.
    """
    out = Path(out)
    known = FORMATS[embed]
    if out.suffix not in known:
        what = "embeddings" if embed else "classes"
        raise ValueError(f"--out {out}: {what} are written as {', '.join(known)}")
    if out.suffix == ".parquet":
        _pyarrow()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"--out {out}: the folder {out.parent} is not writable")
    for path in (out, index_of(out)) if out.suffix == ".npy" else (out,):
        if path.is_dir() or path.exists() and not overwrite:
            raise FileExistsError(f"--out: {path} exists; --overwrite replaces a file")


def index_of(out: Path) -> Path:
    """Return the path of the table beside an .npy file, which has the image of each row."""
    return out.with_suffix(".csv")


def convert(saved: Saved) -> dict[Path, Path]:
    """Write the result in temporary files in the job's folder.

    Args:
        saved: What the job has saved.

    Returns:
        {path of the result: the temporary file}.
    """
    return _CONVERT[saved.out.suffix](saved)


def _csv(saved: Saved) -> dict[Path, Path]:
    made = saved.folder / "made.csv"
    with open(made, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        ranks = range(1, saved.topk + 1)
        names = [f"{what}_{rank}" for rank in ranks for what in ("class", "label", "score")]
        more = ["unknown"] * saved.unknown
        writer.writerow(["image", "error", *names, *more])
        for rows in saved.chunks():
            for row in rows:
                cells = [v for p in row.get("predictions", ()) for v in p.values()]
                cells += [""] * (len(names) - len(cells))
                cells += [str(row.get(name, "")).lower() for name in more]
                writer.writerow([row["image"], row.get("error", ""), *cells])
    return {saved.out: made}


def _jsonl(saved: Saved) -> dict[Path, Path]:
    made = saved.folder / "made.jsonl"
    shutil.copyfile(saved.folder / "rows.jsonl", made)
    return {saved.out: made}


def _npy(saved: Saved) -> dict[Path, Path]:
    made, index = saved.folder / "features.npy", saved.folder / "made.csv"
    shape = f"({saved.readable}, {saved.width})"
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    magic = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
    with open(made, "r+b") as features:
        features.write(magic + head.encode().ljust(NPY_HEADER - 11) + b"\n")
    with open(index, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "row", "error"])
        number = 0
        for rows in saved.chunks():
            for row in rows:
                readable = "error" not in row
                writer.writerow([row["image"], number if readable else "", row.get("error", "")])
                number += readable
    return {index_of(saved.out): index, saved.out: made}


def _parquet(saved: Saved) -> dict[Path, Path]:
    parquet, made = _pyarrow().parquet, saved.folder / "made.parquet"
    with open(saved.folder / ("features.npy" if saved.embed else "rows.jsonl"), "rb") as features:
        features.seek(NPY_HEADER)
        embedding = None
        writer: Any = None
        for rows in saved.chunks():
            if saved.embed:
                width = max(saved.width, 1)
                count = sum("error" not in row for row in rows)
                embedding = np.fromfile(features, "<f4", count * width).reshape(-1, width)
            part = arrow_table(rows, embedding, saved.unknown)
            writer = writer or parquet.ParquetWriter(made, part.schema)
            writer.write_table(part)
        writer.close()
    return {saved.out: made}


_CONVERT: dict[str, Callable[[Saved], dict[Path, Path]]] = {
    ".csv": _csv, ".jsonl": _jsonl, ".npy": _npy, ".parquet": _parquet,
}  # fmt: skip


def arrow_table(
    rows: Sequence[dict], embedding: np.ndarray | None = None, unknown: bool = False
) -> Any:
    """Convert predictions to a pyarrow.Table.

    Args:
        rows: What `entries` yielded.
        embedding: None, or (n, D) fp32: a row for each readable image.
        unknown: Whether rows say of images that they are unknown.

    Returns:
        A pyarrow.Table of image, error, and classes, labels, scores, each a list, best first, and
        unknown where asked; or of image, error, embedding.

    Raises:
        ValueError: If pyarrow is not installed.
    """
    pa = _pyarrow()
    columns = {
        # a path may hold bytes that are not UTF-8
        "image": pa.array([r["image"].encode(errors="backslashreplace").decode() for r in rows]),
        "error": pa.array([r.get("error") for r in rows], pa.string()),
    }
    if embedding is not None:
        found = iter(embedding)
        vectors = [None if "error" in r else next(found) for r in rows]
        columns["embedding"] = pa.array(vectors, pa.list_(pa.float32()))
        return pa.table(columns)
    for name, key, kind in (
        ("classes", "class", pa.int32()), ("labels", "label", pa.string()),
        ("scores", "score", pa.float32()),
    ):  # fmt: skip
        lists = [[p[key] for p in r["predictions"]] if "predictions" in r else None for r in rows]
        columns[name] = pa.array(lists, pa.list_(kind))
    if unknown:
        columns["unknown"] = pa.array([r.get("unknown") for r in rows], pa.bool_())
    return pa.table(columns)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "--out: .parquet needs pyarrow: pip install 'deit_fast[parquet]'"
        ) from None
    return pyarrow
