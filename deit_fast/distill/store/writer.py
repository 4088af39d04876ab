"""Writing the files of a soft-label store, by processes that may die at any moment."""

import fcntl
import os
from io import FileIO
from pathlib import Path

import numpy as np

from .. import checkpoints, run_folder
from ..augment import TRIES
from .format import CHECKSUM, HEADER, Damaged, check_header, checksum, scan
from .manifest import Manifest
from .reader import Records


class Writer:
    """One rank's share of one epoch, appended block after block; goes on with what is there.

    The torn rest of a process that died is cut off.

    Args:
        out: Folder of the store.
        manifest: Of the store.
        epoch: Which one.
        rank: Whose share.

    Attributes:
        done: Records that are there, whole.
        cut: None, or what was wrong with the rest.

    Raises:
        Damaged: A file is there that is not this one's.
        ValueError: Another process writes into it.
    """

    def __init__(self, out: Path, manifest: Manifest, epoch: int, rank: int):
        self.manifest, self.header = manifest, manifest.header(epoch, rank)
        self.cut: Damaged | None = None
        self.path = manifest.path(out, epoch, rank)
        self.part = self.path.with_suffix(".part")
        self.count = manifest.share(rank)[1]
        self.done = 0
        self.file: FileIO | None = None
        if self.path.exists():
            manifest.check_file(self.path, self.header, self.count)
            self.done = self.count
            return
        self.file = open(self.part, "a+b", buffering=0)  # appends, wherever it has been read
        try:
            self._resume(self.file)
        except BaseException:
            self.close()
            raise

    def _resume(self, file: FileIO) -> None:
        manifest = self.manifest
        if not run_folder.lock(file):
            raise ValueError(f"out: another process writes into {self.part}")
        if self.path.exists():  # that process has just completed it
            self.part.unlink(missing_ok=True)
            self.close()
            self.done = self.count
            return
        file.seek(0)
        found = file.read(HEADER.itemsize)
        if len(found) < HEADER.itemsize or not any(found):
            if found and not any(found):  # a power failure may keep the length and lose the content
                self.cut = Damaged(self.part, 0, "the header is all zeros")
            file.truncate(0)
            _append(file, self.header)
            os.fsync(file.fileno())
            return
        check_header(self.part, found, self.header)
        self.done, damage = scan(
            file, self.part, self.header, manifest.record, manifest.batch, self.count
        )
        if os.fstat(file.fileno()).st_size > manifest.file_bytes(self.done):
            self.cut = damage
            file.truncate(manifest.file_bytes(self.done))

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do, not even to give the file its name."""
        return self.file is None

    def require(self, indices: np.ndarray, seeds: np.ndarray) -> None:
        """Check that the records that are there are the first of these.

        Another version of numpy may draw them in another order.

        Raises:
            ValueError: They are not.
        """
        there, at = Records(self.manifest, [(0, self.done, self.part)]), 0
        for which in there.blocks():
            records = there.block(*which)
            part = slice(at, at + len(records))
            # an unreadable image gave way to one behind it, and may be readable by now
            ahead = (records["index"] - indices[part]) % self.manifest.images["count"]
            for name, good in (("index", (ahead < TRIES).all()),
                               ("seed", np.array_equal(records["seed"], seeds[part]))):  # fmt: skip
                if not good:
                    raise ValueError(
                        f"store: {self.part}: {name} of records {at} to {at + len(records) - 1} is "
                        "not what is drawn now; expected the version of numpy that began it"
                    )
            at += len(records)

    def add(self, records: np.ndarray) -> None:
        """Append the next block.

        Args:
            records: `batch` of them, or what is left, of the manifest's `record`.

        Raises:
            ValueError: They are not.
            OSError: They can't be written, such as for a full disk.
        """
        expected = min(self.manifest.batch, self.count - self.done)
        if len(records) != expected or records.dtype != self.manifest.record:
            raise ValueError(
                f"records: {len(records)} of {records.dtype}, expected {expected} of "
                f"{self.manifest.record}"
            )
        content = records.tobytes()
        number = self.done // self.manifest.batch
        end = checksum(self.header, number, content).to_bytes(CHECKSUM, "little")
        _append(self._open_file(), content + end)
        self.done += len(records)

    def seal(self) -> None:
        """Give the complete file its name.

        Raises:
            ValueError: Records are missing.
            Damaged: Somebody else changed the file.
        """
        if self.done != self.count:
            raise ValueError(f"{self.part}: {self.done} records, expected {self.count} to seal it")
        file, expected = self._open_file(), self.manifest.file_bytes(self.count)
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            reason = f"{size} bytes, expected {expected} for {self.count} records"
            raise Damaged(self.part, min(size, expected), reason)
        os.fsync(file.fileno())
        os.replace(self.part, self.path)
        self.close()  # not before: its lock is on what is renamed
        checkpoints.sync_folder(self.path.parent)

    def close(self) -> None:
        """Close the file and let go of its lock."""
        if self.file is not None:
            fcntl.flock(self.file, fcntl.LOCK_UN)  # workers have inherited the file
            self.file.close()
            self.file = None

    def _open_file(self) -> FileIO:
        if self.file is None:
            raise ValueError(f"{self.path}: is complete or closed, expected it open for writing")
        return self.file


def _append(file: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
