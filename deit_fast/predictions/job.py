"""One result file in the making, which any interruption may stop and the next run resumes.

While a job runs, a folder beside the result (`results.csv.partial`) holds

    files.jsonl    the images as they were found when the job began: the order of everything else
    rows.jsonl     the prediction of an image in each line
    features.npy   with embeddings: a row for each readable image
    state.json     the description of the job, the number of images done, and the lengths of the
                   other files at that moment

state.json is replaced, by renaming, after the others are on the disk. A run that resumes truncates
them to these lengths. So whatever ended the run before, no image is lost or done twice.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from deit_fast.batch_inference import Batch

from .entries import entries
from .formats import NPY_HEADER, Saved, check_output, convert

LOCK_TIMEOUT = 10.0  # seconds: the workers of a killed run hold its lock until they notice
SAVE_INTERVAL = 1.0  # seconds between two states: what an interruption costs at most
_FILES = {"files.jsonl", "rows.jsonl", "features.npy", "state.json", "state.tmp"}
_FILES |= {"made.csv", "made.jsonl", "made.parquet"}
_COUNTS = ("total", "done", "failed", "rows", "features", "width")


class WriteError(OSError):
    """The error that ended a job, and where the results so far are."""


class Job:
    """One result file in the making.

    Args:
        out: Its path, whose suffix says the format.
        description: What identifies the job: an interrupted one is resumed only with the same. Of
            it "topk", "threshold" and "unknown" say which columns the result has.
        labels: The names of the classes; None with `embed`.
        embed: Write embeddings instead of classes.
        overwrite: Replace an existing result, at the end.
        restart: Delete what an interrupted run left.

    Attributes:
        state: "description", and the counts of images "total", "done" and "failed".
        resumed: Whether an interrupted run was found.

    Raises:
        ValueError: For a format that does not fit, and if the folder is another job's, in use, or
            corrupt.
        FileExistsError: If the result exists, unless `overwrite`.
        OSError: If nothing can be written. Whatever is raised, no file is changed.
    """

    def __init__(
        self, out: str | Path, description: dict, labels: list[str] | None = None,
        embed: bool = False, overwrite: bool = False, restart: bool = False,
    ):  # fmt: skip
        self.out, self.labels, self.embed, self.overwrite = Path(out), labels, embed, overwrite
        check_output(out, embed, overwrite)
        self.folder = Path(f"{out}.partial")
        self.state: dict[str, Any] = {"description": description} | dict.fromkeys(_COUNTS, 0)
        self._lock_file: IO[str] | None = None
        with self._errors("begin"):
            self.folder.mkdir(exist_ok=True)
            self._lock()
        try:
            if restart:
                with self._errors("begin"):
                    self._empty()
            self.resumed = self._resume()
        except BaseException:
            self._unlock()
            raise
        self._saved_at = 0.0
        self._files: dict[str, BinaryIO] = {}

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _lock(self) -> None:
        self._lock_file = open(self._path("lock"), "w")
        until = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                return fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    self._unlock()
                    what = f"{self.folder} is in use: another run writes {self.out}"
                    raise ValueError(what) from None
                time.sleep(0.1)

    def _unlock(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()

    def _empty(self) -> None:
        names = {path.name for path in self.folder.iterdir()} - {"lock"}
        if strange := sorted(names - _FILES):
            raise ValueError(
                f"{self.folder} holds {strange[0]}, which is no file of a job: move it"
            )
        for name in names:
            self._path(name).unlink()

    def _resume(self) -> bool:
        """Return whether an interrupted run was found; its state is then this job's."""
        path = self._path("state.json")
        if not path.exists():
            rows = self._path("rows.jsonl")
            if rows.exists() and rows.stat().st_size:
                raise self._corrupt("state.json is missing")
            self._empty()  # the run ended while it listed the images
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
        expected = json.loads(json.dumps(self.state["description"]))
        for name in expected | found:
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"{self.folder} holds an interrupted run with {name} {found.get(name)!r}, this "
                    f"one has {expected.get(name)!r}: resume that one, or delete it (--restart)"
                )
        self.state = state
        self._check_files()
        return True

    def _check_files(self) -> None:
        """Check that the files are what the state says."""
        last, lines, listed, line = b"", 0, 0, b"\n"
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
            row, rows = b"", 0
            for line in self._lines("rows.jsonl"):
                if end <= 0:
                    break
                row, rows, end = line, rows + 1, end - len(line)
            if end or rows != lines or lines and json.loads(row)["image"] != json.loads(last):
                raise self._corrupt("rows.jsonl and files.jsonl do not belong together")
            if self.embed and self._path("features.npy").stat().st_size < self.state["features"]:
                raise self._corrupt("features.npy is shorter than state.json says")
        except FileNotFoundError as error:
            raise self._corrupt(f"{Path(str(error.filename)).name} is missing") from None
        except (json.JSONDecodeError, KeyError, TypeError):
            raise self._corrupt("rows.jsonl can't be read") from None

    def _corrupt(self, why: str) -> ValueError:
        return ValueError(
            f"{self.folder} can't be resumed: {why}; it is left as it is, --restart deletes it"
        )

    def _lines(self, name: str) -> Iterator[bytes]:
        with open(self._path(name), "rb") as lines:
            yield from lines

    def begin(self, paths: Iterable[str]) -> None:
        """List the images, and open the files.

        Args:
            paths: The images. A resumed job has those that the interrupted run found.

        Raises:
            ValueError: If there are none.
            WriteError: If a file can't be written.
        """
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
                self._files["features"].write(bytes(NPY_HEADER))
            self.state |= self._lengths()
            self.save()

    def _list(self, paths: Iterable[str]) -> None:
        with self._errors("list the images in"):
            file = open(self._path("files.jsonl"), "w")
        with file:
            for path in paths:  # errors of this iterable are raised as they are
                with self._errors("list the images in"):
                    file.write(json.dumps(path) + "\n")
                self.state["total"] += 1
            with self._errors("list the images in"):
                file.flush()
                os.fsync(file.fileno())
        if not self.state["total"]:
            raise ValueError("no images found")

    def _remove(self) -> None:
        shutil.rmtree(self.folder)
        self._unlock()

    def _lengths(self) -> dict[str, int]:
        return {name: file.tell() for name, file in self._files.items()}

    def todo(self) -> Iterator[str]:
        """Return the images that are not done."""
        lines = islice(self._lines("files.jsonl"), self.state["done"], None)
        return map(json.loads, lines)

    def write(self, batch: Batch) -> None:
        """Save the predictions of the next images.

        Args:
            batch: What `deit_fast.batch_inference.predict` yielded for them.

        Raises:
            WriteError: If a file can't be written.
        """
        rows = list(entries(batch, self.labels))
        with self._errors("write"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            self._files["rows"].write(lines.encode("ascii"))
            width = self.state["width"]
            if self.embed and batch.columns:
                embedding = np.ascontiguousarray(batch.columns["embedding"], "<f4")
                self._files["features"].write(embedding.tobytes())
                width = embedding.shape[1]
            # in one assignment: after an interruption counts and lengths are of the same moment
            self.state = self.state | {
                "done": self.state["done"] + len(rows),
                "failed": self.state["failed"] + sum("error" in row for row in rows),
                "width": width,
                **self._lengths(),
            }
            if time.monotonic() - self._saved_at > SAVE_INTERVAL:
                self.save()

    def save(self) -> None:
        """Flush the files to the disk, and then the state.

        Raises:
            WriteError: If a file can't be written.
        """
        with self._errors("write"):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            temporary = self._path("state.tmp")
            with open(temporary, "w") as state:
                json.dump(self.state, state)
                state.flush()
                os.fsync(state.fileno())
            os.replace(temporary, self._path("state.json"))
            self._saved_at = time.monotonic()

    def finish(self) -> list[Path]:
        """Write the result, and delete the folder.

        Returns:
            The files that the result consists of.

        Raises:
            ValueError: If not all images are done.
            FileExistsError: If the result exists by now, unless `overwrite`.
            WriteError: If a file can't be written.
        """
        self.save()
        if self.state["done"] != self.state["total"]:
            raise self._corrupt(f"{self.state['done']} of {self.state['total']} images are done")
        check_output(self.out, self.embed, self.overwrite)  # it may exist by now
        with self._errors("write"):
            for file in self._files.values():
                file.close()
            asked = self.state["description"]
            unknown = asked.get("threshold") is not None or bool(asked.get("unknown"))
            made = convert(
                Saved(
                    self.out, self.folder, self.embed, asked.get("topk", 1),
                    self.state["width"], self.state["done"] - self.state["failed"], unknown,
                )
            )  # fmt: skip
            for path, temporary in made.items():
                with open(temporary, "rb") as result:
                    os.fsync(result.fileno())
                os.replace(temporary, path)
            self._remove()
        return list(made)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except WriteError:
            raise
        except OSError as error:
            self._unlock()  # the job ends here, and the error's traceback may keep it alive
            what = error.strerror or str(error)
            raise WriteError(
                f"can't {doing} {self.folder}: {what}; what its state.json counts is kept, and the "
                "same command resumes there"
            ) from error
