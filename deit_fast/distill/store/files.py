"""A store on disk, written by processes that may die at any moment and read in any order.

    manifest.json                        what was asked of whom, see `Manifest`
    epoch-0000-rank-0-of-1.records       one writing process's share of an epoch
    epoch-0001-rank-0-of-1.part          the same, not yet complete

A file is a header and blocks of `batch` records, the last one shorter where need be, each block
followed by its checksum. Everything is little-endian and nothing is aligned:

    header      "DFSTORE1", key of the manifest: 16 bytes, epoch, rank, world, K, batch, first,
                count: uint32 (the file has the records first to first + count of its epoch),
                zeros, CRC-32 of all that
    record      index of the image used: int32, seed: int32, K x class: uint16, K x probability:
                fp16, descending; 8 + 4K bytes (TinyViT's 4 + 4K, and the index)
    checksum    CRC-32 of the block's number, then of the block, begun from the header's, so that a
                block passes neither for another one nor in another file
"""

import fcntl
import hashlib
import json
import os
import zlib
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from .. import checkpoints, folder
from ..augment import TRIES
from .pictures import SETTINGS

MANIFEST = "manifest.json"
MAGIC = b"DFSTORE1"
HEADER = np.dtype([
    ("magic", "S8"), ("key", "V16"),
    *((name, "<u4") for name in ("epoch", "rank", "world", "k", "batch", "first", "count")),
    ("zeros", "V8"), ("checksum", "<u4"),
])  # fmt: skip
CHECKSUM = 4  # bytes

PARTS = {  # of a manifest's dicts
    "teacher": {"architecture": str, "weights": str},
    "images": {"count": int, "classes": int, "labels": str, "names": str},
    "transform": dict.fromkeys(SETTINGS, object) | {"input_size": list, "mean": list, "std": list},
    "sample": {"images": list, "pictures": str},
    "notes": {"teacher": str, "versions": dict},
}


class Damaged(ValueError):
    """A file of a store that is not as it was written: `path`, `offset` in bytes, `reason`."""

    def __init__(self, path: Path, offset: int, reason: str):
        super().__init__(f"store: {path}, byte {offset}: {reason}")
        self.path, self.offset, self.reason = path, offset, reason

    def __reduce__(self):  # exceptions are pickled with their message alone
        return type(self), (self.path, self.offset, self.reason)


class Unwritten(Damaged):
    """A file that is not there or not complete: a writer may be on its way to it."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds. Two stores of one `key` that the same kind of device wrote hold the same
    records: how a teacher's sums are rounded depends on it, and is not part of the key.

    teacher: "architecture" and "weights", a digest. images: see `pictures.identify`. transform: see
    `pictures.describe`. sample: see `pictures.Pictures.sample`. classes: C.
    k: pairs of class and probability a record. records: in an epoch. batch: pictures in one pass of
    the teacher, records in a block. world: writing processes. amp: the teacher's precision.
    Not part of the key: epochs, which may become more; and notes, the teacher's name and versions.
    """

    teacher: dict
    images: dict
    transform: dict
    sample: dict
    classes: int
    k: int
    records: int
    batch: int
    seed: int
    world: int
    amp: str
    epochs: int = field(metadata={"key": False})
    notes: dict = field(metadata={"key": False})

    @property
    def key(self) -> str:
        """32 hexadecimal digits."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("key", True)}
        return _digest(known)

    def write(self, folder: Path) -> None:
        content = {"format": 1, "key": self.key} | asdict(self)
        content["checksum"] = _digest(content)  # of what is not part of the key too
        text = json.dumps(content, indent=1) + "\n"
        checkpoints.write(folder / MANIFEST, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises FileNotFoundError, or Damaged where it is not what `write` left."""
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"store: {folder} has no {MANIFEST}") from None
        try:
            found = json.loads(content)
            came = found.pop("checksum")
            known = _digest(found)
            form, key = found.pop("format"), found.pop("key")
            manifest = cls(**found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(path, 0, f"is no manifest ({error!r})") from error
        if (form, key) != (1, manifest.key):
            reason = f"format {form}, key {key}; expected 1 and {manifest.key} for what it says"
            raise Damaged(path, 0, reason)
        if came != known:
            raise Damaged(path, 0, f"checksum {came}, expected {known} for what it says")
        if (reason := manifest._wrong()) is not None:
            raise Damaged(path, 0, reason)
        return manifest

    def _wrong(self):
        """What is not of its type, or too small, in words; or None."""
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not f.type:
                return f"{f.name} is {value!r}, expected {f.type.__name__}"
            if f.type is int and value < (least := 0 if f.name == "seed" else 1):
                return f"{f.name} is {value}, expected {least} or more"
            for name, kind in PARTS.get(f.name, {}).items():
                if name not in value:
                    return f"{f.name} has no {name}"
                if not isinstance(value[name], kind):
                    return f"{f.name} has {name} {value[name]!r}, expected {kind.__name__}"
        return None

    # Where what is

    @property
    def record(self) -> np.dtype:
        pairs = [("classes", "<u2", (self.k,)), ("probs", "<f2", (self.k,))]
        return np.dtype([("index", "<i4"), ("seed", "<i4"), *pairs])

    def share(self, rank: int) -> tuple[int, int]:
        """(first, count) of the records that process writes: whole pairs."""
        pairs = -(-self.records // 2)
        first, end = (min(2 * (pairs * r // self.world), self.records) for r in (rank, rank + 1))
        return first, end - first

    def path(self, folder: Path, epoch: int, rank: int) -> Path:
        return folder / f"epoch-{epoch:04d}-rank-{rank}-of-{self.world}.records"

    def header(self, epoch: int, rank: int) -> bytes:
        first, count = self.share(rank)
        found = np.zeros((), HEADER)
        found["magic"], found["key"] = MAGIC, np.void(bytes.fromhex(self.key))
        for name, value in (("epoch", epoch), ("rank", rank), ("world", self.world), ("k", self.k),
                            ("batch", self.batch), ("first", first), ("count", count)):  # fmt: skip
            found[name] = value
        found["checksum"] = zlib.crc32(found.tobytes()[:-CHECKSUM])
        return found.tobytes()

    def begin(self, block: int) -> int:
        """Offset of a block."""
        return HEADER.itemsize + block * (self.batch * self.record.itemsize + CHECKSUM)

    def length(self, count: int) -> int:
        """Bytes of a file of so many records."""
        blocks = -(-count // self.batch)
        return HEADER.itemsize + count * self.record.itemsize + CHECKSUM * blocks

    @property
    def epoch_bytes(self) -> int:
        """Of an epoch's files, all processes' together."""
        return sum(self.length(self.share(rank)[1]) for rank in range(self.world))


def _digest(content):
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def checksum(header: bytes, block: int, content: bytes) -> int:
    # from the header without its own checksum: the CRC of anything with its CRC is a constant
    begun = zlib.crc32(header[:-CHECKSUM])
    return zlib.crc32(content, zlib.crc32(block.to_bytes(4, "little"), begun))


def check_header(path: Path, found: bytes, expected: bytes) -> None:
    """Raise Damaged, saying which field of a file's first bytes is not the wanted one."""
    if len(found) < HEADER.itemsize:
        raise Damaged(path, len(found), "ends within the header")
    came, wanted = np.frombuffer(found, HEADER)[0], np.frombuffer(expected, HEADER)[0]
    if came["magic"] != MAGIC:
        raise Damaged(path, 0, f"begins with {found[: len(MAGIC)]!r}, expected {MAGIC!r}")
    known = zlib.crc32(found[:-CHECKSUM])
    if came["checksum"] != known:
        reason = f"the header's checksum is {came['checksum']:08x}, its content's {known:08x}"
        raise Damaged(path, HEADER.fields["checksum"][1], reason)
    for name in HEADER.names:
        if came[name].tobytes() != wanted[name].tobytes():
            values = [v[name].tobytes().hex() if name == "key" else v[name] for v in (came, wanted)]
            reason = f"{name} is {values[0]}, expected {values[1]}"
            raise Damaged(path, HEADER.fields[name][1], reason)


def scan(file, path: Path, manifest: Manifest, header: bytes, count: int):
    """(records in whole blocks, None or Damaged) of an open file behind its header."""
    good = 0
    for block in range(-(-count // manifest.batch)):
        rows = min(manifest.batch, count - good)
        size = rows * manifest.record.itemsize
        offset = manifest.begin(block)
        content = file.read(size + CHECKSUM)
        if len(content) < size + CHECKSUM:
            reason = f"ends after {good} of {count} records"
            return good, Damaged(path, offset + len(content), reason)
        came = int.from_bytes(content[size:], "little")
        found = checksum(header, block, content[:size])
        if came != found:
            reason = (
                f"the checksum of records {good} to {good + rows - 1}, at byte {offset + size}, is "
                f"{came:08x}, that of what is there {found:08x}"
            )
            return good, Damaged(path, offset, reason)
        good += rows
    if file.read(1):
        return good, Damaged(path, manifest.length(count), f"goes on after its {count} records")
    return good, None


class Writer:
    """One process's share of one epoch, block after block; goes on with what is there.

    done: records that are there, whole; the torn rest of a process that died is cut off, and `cut`
    is None or what was wrong with it. Raises Damaged for a file that is not this one's, ValueError
    where another process writes into it.
    """

    def __init__(self, out: Path, manifest: Manifest, epoch: int, rank: int):
        self.manifest, self.header, self.cut = manifest, manifest.header(epoch, rank), None
        self.path = manifest.path(out, epoch, rank)
        self.part = self.path.with_suffix(".part")
        self.count = manifest.share(rank)[1]
        self.done, self.file = 0, None
        if self.path.exists():
            check_size(self.path, manifest, self.header, self.count)
            self.done = self.count
            return
        self.file = open(self.part, "a+b", buffering=0)  # appends, wherever it has been read
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self):
        manifest = self.manifest
        if not folder.lock(self.file):
            raise ValueError(f"out: another process writes into {self.part}")
        if self.path.exists():  # that process has just completed it
            self.part.unlink(missing_ok=True)
            self.close()
            self.done = self.count
            return
        self.file.seek(0)
        found = self.file.read(HEADER.itemsize)
        if len(found) < HEADER.itemsize or not any(found):
            if found and not any(found):  # a power failure may keep the length and lose the content
                self.cut = Damaged(self.part, 0, "the header is all zeros")
            self.file.truncate(0)
            self._append(self.header)
            os.fsync(self.file.fileno())
            return
        check_header(self.part, found, self.header)
        self.done, damage = scan(self.file, self.part, manifest, self.header, self.count)
        if os.fstat(self.file.fileno()).st_size > manifest.length(self.done):
            self.cut = damage
            self.file.truncate(manifest.length(self.done))

    @property
    def complete(self) -> bool:
        """Nothing is left to do, not even to give the file its name."""
        return self.file is None

    def require(self, indices: np.ndarray, seeds: np.ndarray) -> None:
        """Raise ValueError unless the records that are there are the first of these, which another
        version of numpy may draw in another order."""
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
        """The next block: `batch` records, or what is left. Raises OSError (a full disk)."""
        expected = min(self.manifest.batch, self.count - self.done)
        if len(records) != expected or records.dtype != self.manifest.record:
            raise ValueError(
                f"records: {len(records)} of {records.dtype}, expected {expected} of {self.manifest.record}"
            )
        content = records.tobytes()
        number = self.done // self.manifest.batch
        self._append(content + checksum(self.header, number, content).to_bytes(CHECKSUM, "little"))
        self.done += len(records)

    def seal(self) -> None:
        """Give the complete file its name."""
        if self.done != self.count:
            raise ValueError(f"{self.part}: {self.done} records, expected {self.count} to seal it")
        size, expected = os.fstat(self.file.fileno()).st_size, self.manifest.length(self.count)
        if size != expected:
            reason = f"{size} bytes, expected {expected} for {self.count} records"
            raise Damaged(self.part, min(size, expected), reason)
        os.fsync(self.file.fileno())
        os.replace(self.part, self.path)
        self.close()  # not before: its lock is on what is renamed
        parent = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)  # or a power failure could undo the renaming
        finally:
            os.close(parent)

    def close(self) -> None:
        if self.file is not None:
            fcntl.flock(self.file, fcntl.LOCK_UN)  # workers have inherited the file
            self.file.close()
            self.file = None

    def _append(self, content):
        left = memoryview(content)
        while left:
            left = left[self.file.write(left) :]


def check_size(path: Path, manifest: Manifest, header: bytes, count: int) -> None:
    """Raise Damaged where a complete file's header or length is not right; reads no record."""
    with open(path, "rb") as file:
        check_header(path, file.read(HEADER.itemsize), header)
        size, expected = os.fstat(file.fileno()).st_size, manifest.length(count)
    if size != expected:
        reason = f"{size} bytes, expected {expected} for {count} records"
        raise Damaged(path, min(size, expected), reason)


class Records:
    """The records of an epoch by their place in it, from memory-mapped files.

    parts: (first, count, path) of each file, in order. For one process and its forks: a map is
    opened when it is first read, and never pickled.
    """

    def __init__(self, manifest: Manifest, parts: list[tuple[int, int, Path]]):
        self.manifest, self.parts = manifest, [part for part in parts if part[1]]
        self.firsts = [first for first, _, _ in self.parts]
        self._maps = {}

    def __len__(self) -> int:
        return sum(count for _, count, _ in self.parts)

    def __getitem__(self, place: int) -> np.void:
        """One record: "index", "seed", "classes" uint16 (K,), "probs" fp16 (K,)."""
        number = bisect_right(self.firsts, place) - 1
        first, count, _ = self.parts[number]
        if not 0 <= place - first < count:
            raise IndexError(f"record {place} of {len(self)}")
        block, row = divmod(place - first, self.manifest.batch)
        offset = self.manifest.begin(block) + row * self.manifest.record.itemsize
        return np.frombuffer(self._map(number), self.manifest.record, 1, offset)[0]

    def where(self, place: int) -> str:
        """A record in words: its file, and the how manieth of it."""
        number = bisect_right(self.firsts, place) - 1
        return f"record {place - self.firsts[number]} of {self.parts[number][2]}"

    def block(self, number: int, block: int) -> np.ndarray:
        """The records of one block of one file, as one pass of the teacher made them."""
        rows = min(self.manifest.batch, self.parts[number][1] - block * self.manifest.batch)
        offset = self.manifest.begin(block)
        return np.frombuffer(self._map(number), self.manifest.record, rows, offset)

    def blocks(self) -> list[tuple[int, int]]:
        """Arguments of `block`, for all of them."""
        batch = self.manifest.batch
        return [(n, b) for n, part in enumerate(self.parts) for b in range(-(-part[1] // batch))]

    def all(self) -> np.ndarray:
        some = [self.block(*which) for which in self.blocks()]
        return np.concatenate(some) if some else np.empty(0, self.manifest.record)

    def _map(self, number):
        if number not in self._maps:
            self._maps[number] = np.memmap(self.parts[number][2], np.uint8, "r")
        return self._maps[number]

    def __getstate__(self):
        return self.__dict__ | {"_maps": {}}


class Store:
    """A store to read. Raises FileNotFoundError where there is none, Damaged for its manifest."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)

    def epoch(self, epoch: int) -> Records:
        """The records of an epoch. Raises Damaged where a file is missing, or its header or length
        is wrong; the checksums of its records are `verify`'s."""
        manifest, parts = self.manifest, []
        for rank in range(manifest.world):
            path = manifest.path(self.folder, epoch, rank)
            first, count = manifest.share(rank)
            if not path.exists():
                part = path.with_suffix(".part")
                half = part.exists()
                reason = "is not complete, write it to its end" if half else "there is no such file"
                raise Unwritten(part if half else path, 0, reason)
            check_size(path, manifest, manifest.header(epoch, rank), count)
            parts.append((first, count, path))
        return Records(manifest, parts)

    def verify(self, epoch: int) -> None:
        """Read all of an epoch. Raises Damaged for the first thing that is wrong."""
        for _, count, path in self.epoch(epoch).parts:
            with open(path, "rb") as file:
                header = file.read(HEADER.itemsize)
                _, damage = scan(file, path, self.manifest, header, count)
            if damage is not None:
                raise damage

    def damage(self, epoch: int) -> Damaged | None:
        """What `verify` says."""
        try:
            self.verify(epoch)
        except Damaged as damage:
            return damage
        return None
