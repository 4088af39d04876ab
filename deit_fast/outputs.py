"""Where a bulk run's answers go: kept as they come, resumed after any interruption, and put in
their place when complete.

While a run goes on, a folder beside the output (`results.csv.partial`) holds

    files.jsonl    the images, as they were found when the run began: the order of everything else
    rows.jsonl     an answer a line
    features.npy   with embeddings: a row for each readable image
    state.json     which run this is, how many images are done, and where the files then ended

state.json is replaced, by renaming, once the others are on the disk. A run that resumes cuts them
to the lengths it gives, so that whatever ended the last one, no image is lost or done twice.
"""

import csv
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from .bulk import Batch

FORMATS = {False: (".csv", ".jsonl", ".parquet"), True: (".npy", ".parquet")}  # by `embed`
PATIENCE = 10.0  # seconds to wait for a killed run's workers, which hold its lock until they notice
EVERY = 1.0  # seconds between two states: what an interruption costs at most
_HEADER = 128  # bytes of an .npy file before the rows
_ROWS = 4096  # that a conversion holds at a time
_OURS = {"files.jsonl", "rows.jsonl", "features.npy", "state.json", "state.tmp"}
_OURS |= {"made.csv", "made.jsonl", "made.parquet"}
_COUNTS = ("total", "done", "failed", "rows", "features", "width")


class NotWritten(OSError):
    """What ended a run, and where what it had done lies."""


class Job:
    """One output file in the making.

    out: its path; what it ends in says the format. description: what makes two runs the same one.
    labels: of the classes. With overwrite an existing output is replaced, at the end; with restart
    what an interrupted run left is thrown away.

    Raises ValueError for a format that does not fit, for another run's leftovers and for corrupt
    ones, FileExistsError, and OSError where nothing can be written. None of them changes a file.
    """

    def __init__(
        self, out: str | Path, description: dict, labels: list[str] | None = None,
        embed: bool = False, overwrite: bool = False, restart: bool = False,
    ):  # fmt: skip
        self.out, self.labels, self.embed, self.overwrite = Path(out), labels, embed, overwrite
        check(out, embed, overwrite)
        self.folder = Path(f"{out}.partial")
        self.state = {"description": description} | dict.fromkeys(_COUNTS, 0)
        self._locked = None
        with self._errors("begin"):
            self.folder.mkdir(exist_ok=True)
            self._lock()
        try:
            if restart:
                with self._errors("begin"):
                    self._empty()
            self.resumed = self._resume()
        except BaseException:
            self._locked.close()
            raise
        self._saved, self._files = 0.0, {}

    def _path(self, name):
        return self.folder / name

    def _lock(self):
        self._locked = open(self._path("lock"), "w")
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    self._locked.close()
                    what = f"{self.folder} is in use: another run writes {self.out}"
                    raise ValueError(what) from None
                time.sleep(0.1)

    def _empty(self):
        names = {path.name for path in self.folder.iterdir()} - {"lock"}
        if strange := sorted(names - _OURS):
            raise ValueError(f"{self.folder} holds {strange[0]}, which no run has left: move it")
        for name in names:
            self._path(name).unlink()

    def _resume(self):
        """Whether an interrupted run was found; its state is then this one's."""
        path = self._path("state.json")
        if not path.exists():
            rows = self._path("rows.jsonl")
            if rows.exists() and rows.stat().st_size:
                raise self._corrupt("state.json is missing")
            self._empty()  # it had not got further than its list of images
            return False
        try:
            state = json.loads(path.read_text())
            counts = [state[name] for name in _COUNTS]
            found = state["description"]
            if not all(type(c) is int and c >= 0 for c in counts) or not isinstance(found, dict):
                raise ValueError
            if state["done"] > state["total"] or state["failed"] > state["done"]:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise self._corrupt("state.json can't be read") from None
        wanted = json.loads(json.dumps(self.state["description"]))
        for name in wanted | found:
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"{self.folder} holds an interrupted run with {name} {found.get(name)!r}, this "
                    f"one has {wanted.get(name)!r}: resume that one, or throw it away (--restart)"
                )
        self.state = state
        self._check()
        return True

    def _check(self):
        """That the files are what the state says."""
        last, lines, listed, line = None, 0, 0, b"\n"
        try:
            for line in self._lines("files.jsonl"):
                listed += 1
                if listed <= self.state["done"]:
                    last, lines = line, listed
            if listed != self.state["total"] or not line.endswith(b"\n"):
                raise self._corrupt(f"files.jsonl ends after {listed} images")
            end = self.state["rows"]
            if self._path("rows.jsonl").stat().st_size < end:
                raise self._corrupt("rows.jsonl is shorter than state.json says")
            row, rows = None, 0
            for line in self._lines("rows.jsonl"):
                if end <= 0:
                    break
                row, rows, end = line, rows + 1, end - len(line)
            if end or rows != lines or lines and json.loads(row)["image"] != json.loads(last):
                raise self._corrupt("rows.jsonl and files.jsonl do not belong together")
            if self.embed and self._path("features.npy").stat().st_size < self.state["features"]:
                raise self._corrupt("features.npy is shorter than state.json says")
        except FileNotFoundError as error:
            raise self._corrupt(f"{Path(error.filename).name} is missing") from None
        except (json.JSONDecodeError, KeyError, TypeError):
            raise self._corrupt("rows.jsonl can't be read") from None

    def _corrupt(self, why):
        return ValueError(
            f"{self.folder} can't be resumed: {why}; it is left as it is, --restart throws it away"
        )

    def _lines(self, name) -> Iterator[bytes]:
        with open(self._path(name), "rb") as lines:
            yield from lines

    def begin(self, paths: Iterable[str]) -> None:
        """Take down the images. A resumed job keeps those that the interrupted run found. Raises
        ValueError if there are none."""
        if not self.resumed:
            try:
                self._list(paths)
            except BaseException:
                self._remove()
                raise
        with self._errors("begin"):
            names = {"rows.jsonl": "rows"} | ({"features.npy": "features"} if self.embed else {})
            for name, count in names.items():
                self._path(name).touch()
                file = self._files[count] = open(self._path(name), "r+b")
                file.truncate(self.state[count])
                file.seek(0, os.SEEK_END)
            if self.embed and not self.state["features"]:
                self._files["features"].write(bytes(_HEADER))
            self.state |= self._lengths()
            self.save()

    def _list(self, paths):
        with self._errors("list the images in"):
            file = open(self._path("files.jsonl"), "w")
        with file:
            for path in paths:  # whose own errors are theirs
                with self._errors("list the images in"):
                    file.write(json.dumps(path) + "\n")
                self.state["total"] += 1
            with self._errors("list the images in"):
                file.flush()
                os.fsync(file.fileno())
        if not self.state["total"]:
            raise ValueError("no images found")

    def _remove(self):
        shutil.rmtree(self.folder)
        self._locked.close()

    def _lengths(self):
        return {name: file.tell() for name, file in self._files.items()}

    def todo(self) -> Iterator[str]:
        """Images that are not done."""
        lines = islice(self._lines("files.jsonl"), self.state["done"], None)
        return map(json.loads, lines)

    def write(self, batch: Batch) -> None:
        """Keep the answers of the next images."""
        rows = list(entries(batch, self.labels))
        with self._errors("write"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            self._files["rows"].write(lines.encode("ascii"))
            width = self.state["width"]
            if self.embed and batch.columns:
                embedding = np.ascontiguousarray(batch.columns["embedding"], "<f4")
                self._files["features"].write(embedding.tobytes())
                width = embedding.shape[1]
            # At once: an interruption finds the counts and the lengths of one moment
            self.state = self.state | {
                "done": self.state["done"] + len(rows),
                "failed": self.state["failed"] + sum("error" in row for row in rows),
                "width": width,
                **self._lengths(),
            }
            if time.monotonic() - self._saved > EVERY:
                self.save()

    def save(self) -> None:
        """Bring what was written to the disk, and then the state that says so."""
        with self._errors("write"):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            temporary = self._path("state.tmp")
            with open(temporary, "w") as file:
                json.dump(self.state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path("state.json"))
            self._saved = time.monotonic()

    def finish(self) -> list[Path]:
        """Put the output in its place; returns the files it is made of."""
        self.save()
        if self.state["done"] != self.state["total"]:
            raise self._corrupt(f"{self.state['done']} of {self.state['total']} images are done")
        check(self.out, self.embed, self.overwrite)  # again: it may have come meanwhile
        with self._errors("write"):
            for file in self._files.values():
                file.close()
            made = _CONVERT[self.out.suffix](self)
            for path, temporary in made.items():
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            self._remove()
        return list(made)

    @contextmanager
    def _errors(self, doing):
        try:
            yield
        except NotWritten:
            raise
        except OSError as error:
            if self._locked:  # this one goes no further, and its error may keep it in memory
                self._locked.close()
            what = error.strerror or str(error)
            raise NotWritten(
                f"can't {doing} {self.folder}: {what}; what its state.json counts is kept, and the "
                "same command goes on from there"
            ) from error

    def _rows(self) -> Iterator[list[dict]]:
        rows = map(json.loads, self._lines("rows.jsonl"))
        return iter(lambda: list(islice(rows, _ROWS)), [])


def check(out: str | Path, embed: bool, overwrite: bool) -> None:
    """Raise what can be said about an output before anything is computed."""
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
    for path in (out, listing(out)) if out.suffix == ".npy" else (out,):
        if path.is_dir() or path.exists() and not overwrite:
            raise FileExistsError(f"--out: {path} exists; --overwrite replaces a file")


def listing(out: Path) -> Path:
    """The table beside an .npy file that says which image each row is of."""
    return out.with_suffix(".csv")


def entries(batch: Batch, labels: list[str] | None) -> Iterator[dict]:
    """{"image", "predictions": [{"class", "label", "score"}]} of each image, best first; with
    "error" instead for an unreadable one, and neither where the batch holds embeddings."""
    row = 0
    for path, reason in zip(batch.paths, batch.reasons, strict=True):
        if reason is not None:
            yield {"image": path, "error": reason}
            continue
        entry = {"image": path}
        if "classes" in batch.columns:
            found = zip(batch.columns["classes"][row], batch.columns["scores"][row], strict=True)
            entry["predictions"] = [
                {"class": int(i), "label": labels[i], "score": round(float(s), 6)} for i, s in found
            ]
        row += 1
        yield entry


def _csv(job):
    made = job._path("made.csv")
    with open(made, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        ranks = range(1, job.state["description"].get("topk", 1) + 1)
        names = [f"{what}_{rank}" for rank in ranks for what in ("class", "label", "score")]
        writer.writerow(["image", "error", *names])
        for rows in job._rows():
            for row in rows:
                cells = [v for p in row.get("predictions", ()) for v in p.values()]
                cells = cells or [""] * len(names)
                writer.writerow([row["image"], row.get("error", ""), *cells])
    return {job.out: made}


def _jsonl(job):
    made = job._path("made.jsonl")
    shutil.copyfile(job._path("rows.jsonl"), made)
    return {job.out: made}


def _npy(job):
    width = job.state["width"]
    count = job.state["done"] - job.state["failed"]
    made, table = job._path("features.npy"), job._path("made.csv")
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, {width}), }}"
    magic = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
    with open(made, "r+b") as file:
        file.write(magic + head.encode().ljust(_HEADER - 11) + b"\n")
    with open(table, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "row", "error"])
        index = 0
        for rows in job._rows():
            for row in rows:
                readable = "error" not in row
                writer.writerow([row["image"], index if readable else "", row.get("error", "")])
                index += readable
    return {listing(job.out): table, job.out: made}


def _parquet(job):
    pq, made = _pyarrow().parquet, job._path("made.parquet")
    with open(job._path("features.npy" if job.embed else "rows.jsonl"), "rb") as features:
        features.seek(_HEADER)
        embedding = writer = None
        for rows in job._rows():
            if job.embed:
                width = max(job.state["width"], 1)
                count = sum("error" not in row for row in rows)
                embedding = np.fromfile(features, "<f4", count * width).reshape(-1, width)
            part = table(rows, embedding)
            writer = writer or pq.ParquetWriter(made, part.schema)
            writer.write_table(part)
        writer.close()
    return {job.out: made}


def table(rows: list[dict], embedding: np.ndarray | None = None):
    """`entries` as a pyarrow.Table: image, error, and classes, labels, scores, lists of the best;
    or embedding, of which there is a row for each readable image."""
    pa = _pyarrow()
    columns = {
        # a path may hold bytes that are no UTF-8
        "image": pa.array([r["image"].encode(errors="backslashreplace").decode() for r in rows]),
        "error": pa.array([r.get("error") for r in rows], pa.string()),
    }
    if embedding is not None:
        found = iter(embedding)
        lists = [None if "error" in r else next(found) for r in rows]
        columns["embedding"] = pa.array(lists, pa.list_(pa.float32()))
        return pa.table(columns)
    for name, key, kind in (
        ("classes", "class", pa.int32()), ("labels", "label", pa.string()),
        ("scores", "score", pa.float32()),
    ):  # fmt: skip
        lists = [[p[key] for p in r["predictions"]] if "predictions" in r else None for r in rows]
        columns[name] = pa.array(lists, pa.list_(kind))
    return pa.table(columns)


_CONVERT = {".csv": _csv, ".jsonl": _jsonl, ".npy": _npy, ".parquet": _parquet}


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "--out: .parquet needs pyarrow: pip install 'deit_fast[parquet]'"
        ) from None
    return pyarrow
