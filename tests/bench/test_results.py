"""The results file: nothing lost, nothing half written, nothing misread; and its schema."""

import json
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import jsonschema
import pytest
from making import HARDWARE, kernel_row, model_row, results_of

from benchmarks import table5
from deit_fast.bench import results
from deit_fast.bench.results import CorruptResults, KernelRow, ModelRow

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "benchmarks" / "results.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
DEIT, RESNET = table5.select(["DeiT-S distilled", "ResNet-50"])[::-1]
FAILED = {"status": "failed", "note": "no"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "h200" / "table5.json"
    results_of(model_row(DEIT), model_row(RESNET, **FAILED), kernel_row()).save(path)
    return path


def test_what_is_written_is_read_and_fits_the_schema(file):
    read = results.load(file)
    assert [type(r) for r in read.rows] == [ModelRow, ModelRow, KernelRow]
    assert read == results_of(model_row(DEIT), model_row(RESNET, **FAILED), kernel_row())
    VALIDATOR.validate(json.loads(file.read_text()))


def test_what_is_not_to_be_had_fits_the_schema(tmp_path):
    row = model_row(DEIT, status="unavailable", note="torchao is not installed")
    results_of(row).save(tmp_path / "a.json")
    VALIDATOR.validate(json.loads((tmp_path / "a.json").read_text()))
    assert results.load(tmp_path / "a.json").rows == [row]


def test_the_schema_knows_exactly_the_rows_fields():
    for kind, row in (("model", ModelRow), ("kernel", KernelRow)):
        known = SCHEMA["$defs"]["timing"]["properties"] | SCHEMA["$defs"][kind]["properties"]
        assert set(known) == {f.name for f in fields(row)}
    assert set(SCHEMA["properties"]) == set(results.HEADER)
    assert set(SCHEMA["properties"]["hardware"]["properties"]) == set(HARDWARE)


@pytest.mark.parametrize("change", [
    {"rows.0.ms_median": None}, {"rows.0.images_per_s": "fast"}, {"rows.0.build": "b"},
    {"rows.0.status": "skipped"}, {"rows.0.protocol": "mine"}, {"rows.0.extra": 1},
    {"rows.1.status": "unavailable", "rows.1.note": None},
    {"rows.1.note": None}, {"rows.2.dtype": "fp8"}, {"commit": "main"}, {"date": "today"},
    {"hardware.gpu": 5}, {"protocol.runs": 0}, {"ceilings.bf16_tflops": 0}, {"ceilings": {}},
], ids=str)  # fmt: skip
def test_the_schema_refuses(file, change):
    content = json.loads(file.read_text())
    for path, value in change.items():
        *parents, name = [int(p) if p.isdigit() else p for p in path.split(".")]
        place = content
        for p in parents:
            place = place[p]
        place[name] = value
    assert not VALIDATOR.is_valid(content)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*/*.json")), ids=lambda p: p.stem
)
def test_committed_results_fit_the_schema(path):
    VALIDATOR.validate(json.loads(path.read_text()))
    results.load(path)


def test_another_chips_file_is_refused(file):
    text = file.read_text()
    with pytest.raises(ValueError, match="holds results of NVIDIA Imaginary, this is a CPU"):
        results.open_results(file, HARDWARE | {"gpu": None}, {}, {})
    assert file.read_text() == text


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda text: text[:-40], "not JSON"),
    (lambda text: "[]", "holds list, want the keys"),
    (lambda text: text.replace('"date"', '"day"'), "want the keys"),
    (lambda text: text.replace('"batch": 256', '"batch": "256"', 1), r"rows\[0\].batch is '256'"),
    (lambda text: text.replace('   "protocol": "batch",\n', "", 1), r"rows\[0\] lacks 'protocol'"),
    (lambda text: text.replace('"timm_name"', '"name"', 1), "unknown field 'name'"),
    (lambda text: text.replace('median": 2560.0', 'median": true', 1), r"want float \| None"),
], ids=["truncated", "list", "key", "type", "lacks", "unknown", "bool"])  # fmt: skip
def test_a_corrupt_file_is_refused_and_left(file, damage, reason):
    text = file.read_text()
    damaged = damage(text)
    assert damaged != text
    file.write_text(damaged)
    with pytest.raises(CorruptResults, match=reason) as caught:
        results.open_results(file, HARDWARE, {}, {})
    assert str(file) in str(caught.value)
    assert file.read_text() == damaged


def test_a_write_that_fails_leaves_the_old_file_alone(file, monkeypatch):
    text = file.read_text()
    broken = results_of(model_row(DEIT, images_per_s=float("nan")))
    with pytest.raises(ValueError):  # JSON has no NaN; found while writing
        broken.save(file)
    assert file.read_text() == text
    assert [p.name for p in file.parent.iterdir()] == ["table5.json"]

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results_of().save(file)
    assert file.read_text() == text
    assert [p.name for p in file.parent.iterdir()] == ["table5.json"]


def test_a_row_measured_again_takes_the_old_ones_place():
    file = results_of(model_row(DEIT), model_row(RESNET), kernel_row())
    faster = model_row(DEIT, images_per_s=200.0, build="c" * 12)
    file.put(faster)
    file.put(kernel_row(ms=1.0))
    assert len(file.rows) == 3 and file.rows[0] is faster and file.rows[2].ms_median == 1.0
    for change in ({"mode": "eager_bf16"}, {"protocol": "paper"}, {"asked_batch": 8}):
        file.put(replace(faster, **change))
    file.put(kernel_row(case="fc2"))
    assert len(file.rows) == 7


def test_fresh_rows_are_those_of_this_build_with_enough_runs():
    row = model_row(DEIT)
    file = results_of(row)
    assert file.fresh(row.key, row.build, 30) is row
    assert file.fresh(row.key, row.build, 10) is row
    assert file.fresh(row.key, row.build, 31) is None
    assert file.fresh(row.key, "c" * 12, 30) is None
    assert file.fresh(model_row(RESNET).key, row.build, 30) is None


def test_the_build_changes_with_sources_versions_and_chip(tmp_path, monkeypatch):
    package = tmp_path / "deit_fast"
    (package / "kernels").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in (package, package / "kernels", tmp_path / "elsewhere"):
        (folder / "__init__.py").write_text(f"# {folder.name if folder != package else ''}")
    monkeypatch.setattr(results.deit_fast, "__file__", str(package / "__init__.py"))
    kernels = results.deit_fast.kernels
    monkeypatch.setattr(kernels, "__file__", str(package / "kernels" / "__init__.py"))
    first = results.build(HARDWARE)
    assert first == results.build(dict(HARDWARE)) and len(first) == 12
    assert results.build(HARDWARE | {"torch": "2.12.0"}) != first
    assert results.build(HARDWARE | {"gpu": "NVIDIA H100"}) != first
    (package / "kernels" / "tuned.json").write_text("{}")
    second = results.build(HARDWARE)
    assert second != first
    (package / "swap.py").write_text("")
    assert results.build(HARDWARE) not in (first, second)


def test_commit_is_the_checkouts_or_the_environments(tmp_path, monkeypatch):
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert results.commit().removesuffix("-dirty") == (head or "unknown")
    monkeypatch.setattr(results.deit_fast, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delenv("DEIT_FAST_COMMIT", raising=False)
    assert results.commit() == "unknown"
    monkeypatch.setenv("DEIT_FAST_COMMIT", "c" * 40)
    assert results.commit() == "c" * 40
