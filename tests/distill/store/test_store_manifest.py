"""The manifest: refused where it is damaged or of something else; and each rank's share."""

import dataclasses

import pytest
from small_stores import (
    write_store,
)

from deit_fast.distill.store import Damaged, Store, check
from deit_fast.distill.store.manifest import Manifest


def test_a_damaged_manifest_is_refused(data, net, copy):
    path = copy / "manifest.json"
    content = path.read_text()
    for changed in (
        content[:-20], "", "[]", content.replace('"k": 2', '"k": 1'),
        content.replace('"format": 1', '"format": 2'), content.replace("amp", "pma"),
        content.replace('"epochs": 3', '"epochs": 2'), content.replace('"torch": "', '"torch": "9'),
        content.replace('"notes": {', '"notes": {"x": 1, '), content.replace("checksum", "x"),
    ):  # fmt: skip
        assert changed != content
        path.write_text(changed)
        with pytest.raises(Damaged, match="manifest.json, byte 0: "):
            Store(copy)
        with pytest.raises(Damaged, match="manifest.json, byte 0: "):
            write_store(data, copy, net)
        assert path.read_text() == changed
    path.unlink()
    with pytest.raises(FileNotFoundError, match="copy has no manifest.json"):
        Store(copy)
    with pytest.raises(ValueError, match="has epoch-0000.* and no manifest.json"):
        write_store(data, copy, net)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"epochs": "3"}, "epochs is '3', expected int"),
        ({"epochs": True}, "epochs is True, expected int"),
        ({"epochs": 0}, "epochs is 0, expected 1 or more"),
        ({"batch": 0}, "batch is 0, expected 1 or more"),
        ({"notes": []}, r"notes is \[\], expected dict"),
        ({"notes": {"teacher": "x"}}, "notes has no versions"),
        ({"notes": {"teacher": "x", "versions": 1}}, "notes has versions 1, expected dict"),
        ({"sample": "x"}, "sample is 'x', expected dict"),
        ({"teacher": {}}, "teacher has no architecture"),
    ],
)
def test_a_manifest_of_other_types_is_refused(change, reason, data, net, copy):
    """Though its key and checksum are right."""
    dataclasses.replace(Store(copy).manifest, **change).write(copy)
    for call in (
        lambda: Store(copy),
        lambda: write_store(data, copy, net),
        lambda: check(data, copy, net),
    ):
        with pytest.raises(Damaged, match=f"manifest.json, byte 0: {reason}"):
            call()


@pytest.mark.parametrize("records", [24, 23, 7, 2, 1])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_of_whole_pairs(records, world):
    manifest = Manifest({}, {}, {}, "", 3, 2, records, 6, 0, world, "none", 1, {})
    shares = [manifest.share(rank) for rank in range(world)]
    ends = [0, *(first + count for first, count in shares)]
    assert ends[:-1] == [first for first, _ in shares] and ends[-1] == records
    assert all(end % 2 == 0 for end in ends[:-1])
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 3
