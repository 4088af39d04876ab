"""The manifest of a soft-label store: what it holds, and where its records lie."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import checkpoints
from ..recipe import VIEW_SETTINGS
from .format import CHECKSUM, HEADER, Damaged, check_header, make_header, record_dtype

MANIFEST = "manifest.json"
PARTS: dict[str, dict[str, Any]] = {  # of a manifest's dicts
    "teacher": {"architecture": str, "weights": str},
    "images": {"count": int, "classes": int, "labels": str, "names": str},
    "transform": dict.fromkeys(VIEW_SETTINGS, object)
    | {"input_size": list, "mean": list, "std": list},
    "sample": {"images": list, "pictures": str},
    "notes": {"teacher": str, "versions": dict},
}


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Two stores of one `key` that the same kind of device wrote hold the same records: how a
    teacher's sums are rounded depends on the device, and is not part of the key. Nor are `epochs`,
    which may become more, and `notes`.

    Attributes:
        teacher: "architecture" and "weights", a digest.
        images: See `views.fingerprint`.
        transform: See `views.describe_transform`.
        sample: See `views.Views.sample`.
        classes: C, that the teacher has.
        k: Pairs of class and probability in a record.
        records: In an epoch.
        batch: Views in one forward pass of the teacher, which are the records of a block.
        seed: Of order and augmentation.
        world: How many ranks write, the world size.
        amp: The teacher's precision.
        epochs: How many there are or will be.
        notes: The teacher's name, and versions of packages.
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
        """32 hexadecimal digits that identify the content."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("key", True)}
        return _digest(known)

    def write(self, folder: Path) -> None:
        """Write it into a store's folder, whole or not at all."""
        content = {"format": 1, "key": self.key} | asdict(self)
        content["checksum"] = _digest(content)  # of what is not part of the key too
        text = json.dumps(content, indent=1) + "\n"
        checkpoints.write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read that of a store.

        Raises:
            FileNotFoundError: There is none.
            Damaged: It is not what `write` left.
        """
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"store: {folder} has no {MANIFEST}") from None
        try:
            found = json.loads(content)
            stored = found.pop("checksum")
            computed = _digest(found)
            form, key = found.pop("format"), found.pop("key")
            manifest = cls(**found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(path, 0, f"is no manifest ({error!r})") from error
        if (form, key) != (1, manifest.key):
            reason = f"format {form}, key {key}; expected 1 and {manifest.key} for what it says"
            raise Damaged(path, 0, reason)
        if stored != computed:
            raise Damaged(path, 0, f"checksum {stored}, expected {computed} for what it says")
        if (problem := manifest._problem()) is not None:
            raise Damaged(path, 0, problem)
        return manifest

    def _problem(self) -> str | None:
        """What is not of its type, or too small, in words."""
        for f in fields(self):
            value: Any = getattr(self, f.name)
            kind = cast(type, f.type)  # no annotation here is a string
            exact = type(value) is kind  # unlike for isinstance, True is no int
            if not exact:
                return f"{f.name} is {value!r}, expected {kind.__name__}"
            if kind is int and value < (least := 0 if f.name == "seed" else 1):
                return f"{f.name} is {value}, expected {least} or more"
            for name, part in PARTS.get(f.name, {}).items():
                if name not in value:
                    return f"{f.name} has no {name}"
                if not isinstance(value[name], part):
                    return f"{f.name} has {name} {value[name]!r}, expected {part.__name__}"
        return None

    # Where what is

    @property
    def record(self) -> np.dtype:
        """The dtype of a record."""
        return record_dtype(self.k)

    def share(self, rank: int) -> tuple[int, int]:
        """Return (first, count) of the records that a rank writes: whole pairs."""
        pairs = -(-self.records // 2)
        first, end = (min(2 * (pairs * r // self.world), self.records) for r in (rank, rank + 1))
        return first, end - first

    def path(self, folder: Path, epoch: int, rank: int) -> Path:
        """Name a rank's complete file of an epoch."""
        return folder / f"epoch-{epoch:04d}-rank-{rank}-of-{self.world}.records"

    def header(self, epoch: int, rank: int) -> bytes:
        """Make that file's first bytes."""
        first, count = self.share(rank)
        return make_header(
            self.key, epoch=epoch, rank=rank, world=self.world, k=self.k, batch=self.batch,
            first=first, count=count,
        )  # fmt: skip

    def block_offset(self, block: int) -> int:
        """Where a block begins in its file, in bytes."""
        return HEADER.itemsize + block * (self.batch * self.record.itemsize + CHECKSUM)

    def file_bytes(self, count: int) -> int:
        """Size of a file of so many records."""
        blocks = -(-count // self.batch)
        return HEADER.itemsize + count * self.record.itemsize + CHECKSUM * blocks

    @property
    def epoch_bytes(self) -> int:
        """Size of an epoch's files, all ranks' together."""
        return sum(self.file_bytes(self.share(rank)[1]) for rank in range(self.world))

    def check_file(self, path: Path, header: bytes, count: int) -> None:
        """Check a complete file's header and length, without reading any record.

        Raises:
            Damaged: Either is wrong.
        """
        with open(path, "rb") as file:
            check_header(path, file.read(HEADER.itemsize), header)
            size, expected = os.fstat(file.fileno()).st_size, self.file_bytes(count)
        if size != expected:
            reason = f"{size} bytes, expected {expected} for {count} records"
            raise Damaged(path, min(size, expected), reason)


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
