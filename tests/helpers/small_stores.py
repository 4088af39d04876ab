"""Small soft-label stores, written and learnt from."""

import sys
from pathlib import Path

from small_runs import run

from deit_fast.distill import recipe
from deit_fast.distill.store import write

DEIT = recipe.load("deit")
STORE = {"epochs": 3, "k": 2, "batch": 6, "img_size": 16}
BLOCK = 6 * 16 + 4  # of such a store
write_module = sys.modules["deit_fast.distill.store.write"]  # its function hides it


def write_store(data, out, net, of=DEIT, **change):
    return write(data, out, net, of, **STORE | change)


def epoch_files(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.glob("epoch-*"))}


def train_from_store(data, out, store, **kwargs):
    """A run of small_runs from a store; returns its last checkpoint."""
    given = {"img_size": None, "store": str(store)} | kwargs
    return run(data, out, **given)


def flip_bit(content: bytes, place: int, bit=4) -> bytes:
    changed = bytearray(content)
    changed[place] ^= bit
    return bytes(changed)
