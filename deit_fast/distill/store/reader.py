"""Reading and verifying the files of a soft-label store."""

from bisect import bisect_right
from pathlib import Path

import numpy as np

from .format import HEADER, Damaged, Unwritten, scan
from .manifest import Manifest


class Records:
    """The records of an epoch by their place in it, from memory-mapped files.

    For one process and its forks: a map is opened when it is first read, and never pickled.

    Args:
        manifest: Of the store.
        parts: (first, count, path) of each file, in order.
    """

    def __init__(self, manifest: Manifest, parts: list[tuple[int, int, Path]]):
        self.manifest, self.parts = manifest, [part for part in parts if part[1]]
        self.firsts = [first for first, _, _ in self.parts]
        self._maps: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return sum(count for _, count, _ in self.parts)

    def __getitem__(self, place: int) -> np.void:
        """One record: "index", "seed", "classes" uint16 (K,), "probs" fp16 (K,)."""
        number = bisect_right(self.firsts, place) - 1
        first, count, _ = self.parts[number]
        if not 0 <= place - first < count:
            raise IndexError(f"record {place} of {len(self)}")
        block, row = divmod(place - first, self.manifest.batch)
        offset = self.manifest.block_offset(block) + row * self.manifest.record.itemsize
        return np.frombuffer(self._map(number), self.manifest.record, 1, offset)[0]

    def where(self, place: int) -> str:
        """Name a record by its number in its file, for an error."""
        number = bisect_right(self.firsts, place) - 1
        return f"record {place - self.firsts[number]} of {self.parts[number][2]}"

    def block(self, number: int, block: int) -> np.ndarray:
        """Return the records of one block of one file: one forward pass of the teacher."""
        rows = min(self.manifest.batch, self.parts[number][1] - block * self.manifest.batch)
        offset = self.manifest.block_offset(block)
        return np.frombuffer(self._map(number), self.manifest.record, rows, offset)

    def blocks(self) -> list[tuple[int, int]]:
        """Arguments of `block`, for all of them."""
        batch = self.manifest.batch
        return [(n, b) for n, part in enumerate(self.parts) for b in range(-(-part[1] // batch))]

    def all(self) -> np.ndarray:
        """Read all records into one array (records,)."""
        some = [self.block(*which) for which in self.blocks()]
        return np.concatenate(some) if some else np.empty(0, self.manifest.record)

    def _map(self, number: int) -> np.memmap:
        if number not in self._maps:
            self._maps[number] = np.memmap(self.parts[number][2], np.uint8, "r")
        return self._maps[number]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}


class Store:
    """A soft-label store to read.

    Args:
        folder: Where it lies.

    Raises:
        FileNotFoundError: There is none.
        Damaged: Its manifest is.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)

    def epoch(self, epoch: int) -> Records:
        """Open the records of an epoch; their checksums are left to `verify`.

        Raises:
            Damaged: A file is missing, or its header or length is wrong.
        """
        manifest, parts = self.manifest, []
        for rank in range(manifest.world):
            path = manifest.path(self.folder, epoch, rank)
            first, count = manifest.share(rank)
            if not path.exists():
                part = path.with_suffix(".part")
                half = part.exists()
                reason = "is not complete, write it to its end" if half else "there is no such file"
                raise Unwritten(part if half else path, 0, reason)
            manifest.check_file(path, manifest.header(epoch, rank), count)
            parts.append((first, count, path))
        return Records(manifest, parts)

    def verify(self, epoch: int) -> None:
        """Read all of an epoch.

        Raises:
            Damaged: For the first thing that is wrong.
        """
        record, batch = self.manifest.record, self.manifest.batch
        for _, count, path in self.epoch(epoch).parts:
            with open(path, "rb") as file:
                header = file.read(HEADER.itemsize)
                _, damage = scan(file, path, header, record, batch, count)
            if damage is not None:
                raise damage

    def damage(self, epoch: int) -> Damaged | None:
        """Return what `verify` raises, or None for an epoch that is whole."""
        try:
            self.verify(epoch)
        except Damaged as damage:
            return damage
        return None
