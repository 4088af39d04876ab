"""Every format of result files has the same content; what can not be written is refused."""

import csv
import json
import sys

import numpy as np
import pytest
import selection
from prediction_jobs import BROKEN, LABELS, PATHS, job, run

from deit_fast.batch_inference import Batch
from deit_fast.predictions import formats


def test_formats_say_the_same(tmp_path):
    for suffix in ("csv", "jsonl"):
        run(tmp_path / f"a.{suffix}")
    with open(tmp_path / "a.csv", newline="", errors="surrogateescape") as file:
        from_csv = list(csv.DictReader(file))
    from_jsonl = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    assert [row["image"] for row in from_csv] == PATHS
    assert [row["image"] for row in from_jsonl] == PATHS
    for i, (a, b) in enumerate(zip(from_csv, from_jsonl, strict=True)):
        assert None not in a and None not in a.values()  # a cell for each column
        if PATHS[i] in BROKEN:
            assert a["error"] == b["error"] == "is broken"
            assert a["class_1"] == "" and "predictions" not in b
            continue
        assert a["error"] == "" and "error" not in b
        classes, scores = [i % 10, (i + 1) % 10], pytest.approx([0.5 + i / 100, i / 1000])
        labels = [LABELS[k] for k in classes]
        assert [p["class"] for p in b["predictions"]] == classes
        assert [int(a["class_1"]), int(a["class_2"])] == classes
        assert [p["label"] for p in b["predictions"]] == [a["label_1"], a["label_2"]] == labels
        assert [p["score"] for p in b["predictions"]] == scores
        assert [float(a["score_1"]), float(a["score_2"])] == scores
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.jsonl"]


@pytest.mark.slow
def test_parquet_says_what_jsonl_does(tmp_path):
    selection.extra("parquet", "pyarrow")
    from pyarrow import parquet

    for suffix in ("jsonl", "parquet"):
        run(tmp_path / f"a.{suffix}")
    from_jsonl = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    from_parquet = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["image"] for row in from_parquet][:5] == PATHS[:5]
    assert from_parquet[5]["image"] == "\\udcff.jpg"
    for a, b in zip(from_jsonl, from_parquet, strict=True):
        assert a.get("error") == b["error"]
        if b["error"]:
            assert b["classes"] is b["labels"] is b["scores"] is None
            continue
        for name, column in (("class", "classes"), ("label", "labels")):
            assert [p[name] for p in a["predictions"]] == b[column]
        assert [p["score"] for p in a["predictions"]] == pytest.approx(b["scores"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.parquet"]


def test_embeddings(tmp_path):
    run(tmp_path / "a.npy", embed=True)
    matrix = np.load(tmp_path / "a.npy")
    assert matrix.dtype == np.float32 and matrix.shape == (19, 3)
    with open(tmp_path / "a.csv", newline="", errors="surrogateescape") as file:
        table = list(csv.DictReader(file))
    assert [row["image"] for row in table] == PATHS
    for i, row in enumerate(table):
        if PATHS[i] in BROKEN:
            assert (row["row"], row["error"]) == ("", "is broken")
        else:
            assert row["error"] == ""
            assert matrix[int(row["row"])].tolist() == [i, i / 2, -i]


@pytest.mark.slow
def test_embeddings_in_parquet(tmp_path):
    selection.extra("parquet", "pyarrow")
    from pyarrow import parquet

    run(tmp_path / "a.parquet", embed=True)
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for i, (path, row) in enumerate(zip(PATHS, rows, strict=True)):
        if path in BROKEN:
            assert row["embedding"] is None and row["error"] == "is broken"
        else:
            assert row["error"] is None and row["embedding"] == [i, i / 2, -i]


def test_without_pyarrow_no_parquet_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'deit_fast\[parquet\]'"):
        run(tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["a.csv", "a.jsonl", pytest.param("a.parquet", marks=pytest.mark.slow), "a.npy"]
)
def test_no_image_at_all_is_readable(tmp_path, name):
    if name.endswith("parquet"):
        selection.extra("parquet", "pyarrow")
    embed = name == "a.npy"
    one = job(tmp_path / name, embed)
    one.begin([PATHS[1], PATHS[7]])
    one.write(Batch([PATHS[1], PATHS[7]], ["is broken"] * 2, {}))
    one.finish()
    assert (tmp_path / name).exists()
    if embed:
        assert len(np.load(tmp_path / name)) == 0


def test_the_table_beside_npy_is_no_ones_elses(tmp_path):
    (tmp_path / "a.csv").write_text("earlier")
    with pytest.raises(FileExistsError, match="a.csv exists"):
        job(tmp_path / "a.npy", True)


@pytest.mark.parametrize(
    "name, embed, error, message",
    [
        ("a.txt", False, ValueError, "classes are written as .csv, .jsonl, .parquet"),
        ("a.csv", True, ValueError, "embeddings are written as .npy, .parquet"),
        ("none/a.csv", False, FileNotFoundError, "there is no folder"),
    ],
)
def test_outputs_that_can_not_be(tmp_path, name, embed, error, message):
    with pytest.raises(error, match=message):
        job(tmp_path / name, embed)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="not writable"):
        job(tmp_path / "a.csv")


@pytest.mark.slow
def test_unknown_images_in_parquet(tmp_path):
    """Also where a chunk has unreadable images alone."""
    selection.extra("parquet", "pyarrow")
    prediction = {"class": 1, "label": "b", "score": 0.5}
    rows = [
        {"image": "a", "predictions": [], "unknown": True},
        {"image": "b", "predictions": [prediction], "unknown": False},
        {"image": "c", "error": "is broken"},
    ]
    table = formats.arrow_table(rows, unknown=True)
    assert table.column("unknown").to_pylist() == [True, False, None]
    assert table.column("labels").to_pylist() == [[], ["b"], None]
    assert formats.arrow_table(rows[2:], unknown=True).schema == table.schema
    assert "unknown" not in formats.arrow_table(rows[2:]).column_names
