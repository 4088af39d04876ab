"""The format of a soft-label store's files, and how damage to them is found.

    manifest.json                        what was asked of which teacher, see `manifest.Manifest`
    epoch-0000-rank-0-of-1.records       one writing rank's share of an epoch
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

import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

MAGIC = b"DFSTORE1"
HEADER = np.dtype([
    ("magic", "S8"), ("key", "V16"),
    *((name, "<u4") for name in ("epoch", "rank", "world", "k", "batch", "first", "count")),
    ("zeros", "V8"), ("checksum", "<u4"),
])  # fmt: skip
CHECKSUM = 4  # bytes


class Damaged(ValueError):
    """A file of a store that is not as it was written.

    Args:
        path: The file, an attribute too.
        offset: Where, in bytes, an attribute too.
        reason: What is wrong, an attribute too.
    """

    def __init__(self, path: Path, offset: int, reason: str):
        super().__init__(f"store: {path}, byte {offset}: {reason}")
        self.path, self.offset, self.reason = path, offset, reason

    def __reduce__(self):  # exceptions are pickled with their message alone
        return type(self), (self.path, self.offset, self.reason)


class Unwritten(Damaged):
    """A file that is not there or not complete: a writer may be on its way to it."""


def record_dtype(k: int) -> np.dtype:
    """The dtype of a record of K classes."""
    pairs = [("classes", "<u2", (k,)), ("probs", "<f2", (k,))]
    return np.dtype([("index", "<i4"), ("seed", "<i4"), *pairs])


def make_header(key: str, **numbers: int) -> bytes:
    """Make the first bytes of a file.

    Args:
        key: Of the manifest, 32 hexadecimal digits.
        **numbers: The header's other fields by name.
    """
    found = np.zeros((), HEADER)
    found["magic"], found["key"] = MAGIC, np.void(bytes.fromhex(key))
    for name, value in numbers.items():
        found[name] = value
    found["checksum"] = zlib.crc32(found.tobytes()[:-CHECKSUM])
    return found.tobytes()


def checksum(header: bytes, block: int, content: bytes) -> int:
    """CRC-32 of a block, by its number and its file's header."""
    # from the header without its own checksum: the CRC of anything with its CRC is a constant
    begun = zlib.crc32(header[:-CHECKSUM])
    return zlib.crc32(content, zlib.crc32(block.to_bytes(4, "little"), begun))


def _offset(field: str) -> int:
    return cast(dict, HEADER.fields)[field][1]


def check_header(path: Path, found: bytes, expected: bytes) -> None:
    """Compare a file's first bytes with the expected header.

    Raises:
        Damaged: They differ; the reason names the field.
    """
    if len(found) < HEADER.itemsize:
        raise Damaged(path, len(found), "ends within the header")
    here, right = np.frombuffer(found, HEADER)[0], np.frombuffer(expected, HEADER)[0]
    if here["magic"] != MAGIC:
        raise Damaged(path, 0, f"begins with {found[: len(MAGIC)]!r}, expected {MAGIC!r}")
    computed = zlib.crc32(found[:-CHECKSUM])
    if here["checksum"] != computed:
        reason = f"the header's checksum is {here['checksum']:08x}, its content's {computed:08x}"
        raise Damaged(path, _offset("checksum"), reason)
    for name in cast(tuple, HEADER.names):
        if here[name].tobytes() != right[name].tobytes():
            values = [v[name].tobytes().hex() if name == "key" else v[name] for v in (here, right)]
            reason = f"{name} is {values[0]}, expected {values[1]}"
            raise Damaged(path, _offset(name), reason)


def scan(
    file: BinaryIO, path: Path, header: bytes, record: np.dtype, batch: int, count: int
) -> tuple[int, Damaged | None]:
    """Read all blocks of a file and compare their checksums.

    Args:
        file: Open, behind its header.
        path: Its name, for errors.
        header: Its first bytes.
        record: See `record_dtype`.
        batch: Records in a block.
        count: Records that are expected.

    Returns:
        How many records are in whole blocks at the beginning, and what is wrong behind them.
    """
    good = 0
    offset = HEADER.itemsize
    for block in range(-(-count // batch)):
        rows = min(batch, count - good)
        size = rows * record.itemsize
        content = file.read(size + CHECKSUM)
        if len(content) < size + CHECKSUM:
            reason = f"ends after {good} of {count} records"
            return good, Damaged(path, offset + len(content), reason)
        stored = int.from_bytes(content[size:], "little")
        computed = checksum(header, block, content[:size])
        if stored != computed:
            reason = (
                f"the checksum of records {good} to {good + rows - 1}, at byte {offset + size}, is "
                f"{stored:08x}, that of what is there {computed:08x}"
            )
            return good, Damaged(path, offset, reason)
        good += rows
        offset += size + CHECKSUM
    if file.read(1):
        return good, Damaged(path, offset, f"goes on after its {count} records")
    return good, None
