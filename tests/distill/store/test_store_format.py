"""The format of a soft-label store, and that damage to it is found."""

import dataclasses
import json
import shutil
import zlib

import numpy as np
import pytest
from small_stores import (
    BLOCK,
    epoch_files,
    flip_bit,
    write_store,
)

from deit_fast.cli import main
from deit_fast.distill.store import Damaged, Store
from deit_fast.distill.store.format import checksum
from deit_fast.distill.store.manifest import Manifest


def test_every_image_once_an_epoch_in_the_format_described(data, net, whole):
    store = Store(whole)
    seen = []
    for epoch in range(3):
        records = store.epoch(epoch)
        assert (
            sorted(record["index"] for record in records.all()) == list(range(24))
            and len(records) == 24
        )
        seen += [(epoch, *pair) for pair in records.all()[["index", "seed"]].tolist()]
        path = whole / f"epoch-{epoch:04d}-rank-0-of-1.records"
        content = path.read_bytes()
        assert len(content) == 64 + 24 * (8 + 4 * 2) + 4 * 4
        assert content[:8] == b"DFSTORE1" and content[8:24].hex() == store.manifest.key
        (index, seed), pairs = np.frombuffer(content, "<i4", 2, 64), content[72:80]
        assert (index, seed) == tuple(records[0][["index", "seed"]])
        assert np.array_equal(np.frombuffer(pairs, "<u2", 2), records[0]["classes"])
        assert np.array_equal(np.frombuffer(pairs, "<f2", 2, 4), records[0]["probs"])
    assert len({seed for *_, seed in seen}) == 72
    for place in (-1, 24):
        with pytest.raises(IndexError, match=f"record {place} of 24"):
            store.epoch(0)[place]
    assert [i for e, i, _ in seen if e == 0] != [i for e, i, _ in seen if e == 1]


def test_a_checksum_is_of_its_place_and_its_file():
    """And not the constant that a CRC of something with its CRC is."""
    manifests = [Manifest({}, {}, {}, "", 3, 2, 24, 6, seed, 1, "none", 3, {}) for seed in (0, 1)]
    headers = [m.header(epoch, 0) for m in manifests for epoch in (0, 1)]
    assert all(zlib.crc32(h[:-4]) == int.from_bytes(h[-4:], "little") for h in headers)
    found = {checksum(h, block, b"records") for h in headers for block in (0, 1)}
    assert len(found) == 8
    longer = dataclasses.replace(manifests[0], epochs=9, notes={"teacher": "x"})
    assert longer.key == manifests[0].key != manifests[1].key


DAMAGES = {  # what is done to a file -> offset, reason
    "truncated": (lambda c: c[:200], 200, "200 bytes, expected 464 for 24 records"),
    "one byte short": (lambda c: c[:-1], 463, "463 bytes, expected 464"),
    "empty": (lambda c: b"", 0, "ends within the header"),
    "longer": (lambda c: c + b"x", 464, "465 bytes, expected 464"),
    "magic": (lambda c: flip_bit(c, 2), 0, "begins with b'DFWTORE1', expected b'DFSTORE1'"),
    "header": (lambda c: flip_bit(c, 30), 60, "the header's checksum is"),
    "header's checksum": (lambda c: flip_bit(c, 61), 60, "the header's checksum is"),
    "record": (
        lambda c: flip_bit(c, 64 + BLOCK + 40), 64 + BLOCK,
        f"the checksum of records 6 to 11, at byte {64 + 2 * BLOCK - 4}, is",
    ),
    "checksum": (
        lambda c: flip_bit(c, 64 + 2 * BLOCK - 2), 64 + BLOCK, "checksum of records 6 to 11",
    ),
    "blocks exchanged": (
        lambda c: c[:64] + c[64 + BLOCK : 64 + 2 * BLOCK] + c[64 : 64 + BLOCK]
        + c[64 + 2 * BLOCK :], 64, "the checksum of records 0 to 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_rest_is_used(damage, data, net, whole, copy, capsys):
    path = copy / "epoch-0001-rank-0-of-1.records"
    change, offset, reason = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Damaged) as caught:
        Store(copy).verify(1)
    assert (caught.value.path, caught.value.offset) == (path, offset)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"store: {path}, byte {offset}: ")
    for epoch in (0, 2):
        Store(copy).verify(epoch)
    assert main(["distill-store", "info", str(copy)]) == 1
    said = capsys.readouterr().out
    assert f"epoch 1: {caught.value}" in said and "2 of 3 epochs are whole" in said
    assert main(["distill-store", "info", str(copy), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["whole"] and found["damaged"] == {"1": str(caught.value)}
    # deleted, it is written anew
    path.unlink()
    write_store(data, copy, net)
    assert epoch_files(copy) == epoch_files(whole)


def test_a_file_in_anothers_place(data, net, whole, copy, tmp_path):
    first, second = (copy / f"epoch-000{epoch}-rank-0-of-1.records" for epoch in (0, 1))
    shutil.copy(first, second)
    with pytest.raises(Damaged, match="byte 24: epoch is 0, expected 1"):
        Store(copy).epoch(1)
    write_store(data, tmp_path / "other", net, seed=1)
    one, other = (Store(path).epoch(1).all() for path in (whole, tmp_path / "other"))
    assert all(not np.array_equal(one[name], other[name]) for name in ("index", "seed"))
    shutil.copy(tmp_path / "other" / second.name, second)
    with pytest.raises(Damaged, match="byte 8: key is .*, expected"):
        Store(copy).epoch(1)
    with pytest.raises(Damaged, match="byte 8: key is"):
        write_store(data, copy, net)  # nor does a writer go on with it
    second.rename(second.with_suffix(".part"))
    with pytest.raises(Damaged, match=r"\.part, byte 8: key is"):
        write_store(data, copy, net)
