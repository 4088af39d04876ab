"""The results file: nothing lost, nothing half written, nothing misread; and its schema."""

import json
import re
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import jsonschema
import pytest
from made_up_results import HARDWARE, kernel_row, model_row, results_of

from benchmarks import table5
from benchmarks.measured import ratio
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


def test_names_of_before_0_1_are_read(file):
    text = file.read_text()
    for new, old in (("fraction_of_peak_rate", "fraction_of_ceiling"), ("peak_rates", "ceilings")):
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{old}"')
    before = file.with_name("before.json")
    before.write_text(text)
    assert results.load(before) == results.load(file)


def test_an_unavailable_row_fits_the_schema(tmp_path):
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
    {"hardware.gpu": 5}, {"protocol.runs": 0}, {"peak_rates.bf16_tflops": 0}, {"peak_rates": {}},
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


def test_committed_results_fit_the_schema():
    for chip in (ROOT / "benchmarks" / "results").glob("*/"):
        for path in results.paths(chip):
            VALIDATOR.validate(json.loads(path.read_text()))
            results.load(path)


def test_another_chips_file_is_refused(file):
    text = file.read_text()
    with pytest.raises(ValueError, match="holds results of NVIDIA Imaginary, this is a CPU"):
        results.open_results(file, HARDWARE | {"gpu": None}, {}, {})
    assert file.read_text() == text
    results_of(gpu=None).save(file)
    with pytest.raises(ValueError, match=r"results of a CPU \(none\), this is a CPU \(other\)"):
        results.open_results(file, HARDWARE | {"gpu": None, "cpu": "other"}, {}, {})


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda text: text[:-40], "not JSON"),
    (lambda text: "[]", "holds list, expected the keys"),
    (lambda text: text.replace('"date"', '"day"'), "expected the keys"),
    (lambda text: text.replace('"batch": 256', '"batch": "256"', 1), r"rows\[0\].batch is '256'"),
    (lambda text: text.replace('   "protocol": "batch",\n', "", 1), r"rows\[0\] lacks 'protocol'"),
    (lambda text: text.replace('"timm_name"', '"name"', 1), "unknown field 'name'"),
    (lambda text: text.replace('median": 2560.0', 'median": true', 1), r"expected float \| None"),
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


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The package as a tree of a few files, and a folder of tuned tables."""
    package = tmp_path / "deit_fast"
    for folder in ("kernels/tuned", "kernels/linear", "layers", "bench"):
        (package / folder).mkdir(parents=True)
    for path in ("__init__.py", "kernels/__init__.py", "layers/block.py", "bench/timing.py"):
        (package / path).write_text(f"# {path}")
    monkeypatch.setattr(results.deit_fast, "__file__", str(package / "__init__.py"))
    kernels = results.deit_fast.kernels
    monkeypatch.setattr(kernels, "__file__", str(package / "kernels" / "__init__.py"))
    monkeypatch.setattr(results._tuned, "SHIPPED", package / "kernels" / "tuned")
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path / "cache"))
    return package


def test_the_build_changes_with_what_decides_a_figure(copied):
    first = results.build(HARDWARE)
    assert first == results.build(dict(HARDWARE)) and len(first) == 12
    assert results.build(HARDWARE | {"driver": "2", "cpu": "another", "threads": 64}) == first
    cpu = HARDWARE | {"gpu": None}
    for change in ({"cpu": "another"}, {"threads": 64}):
        assert results.build(cpu | change) != results.build(cpu)
    assert results.build(HARDWARE | {"torch": "2.12.0"}) != first
    assert results.build(HARDWARE | {"gpu": "NVIDIA H100"}) != first
    (copied / "bench" / "timing.py").write_text("")
    assert results.build(HARDWARE) == first
    seen = {first}
    decides = (
        "layers/block.py", "layers/vit/block.py", "swap.py", "quantization/scales.py",
        "kernels/linear.py", "kernels/attention/forward.py",
    )  # fmt: skip
    for path in decides:
        (copied / path).parent.mkdir(exist_ok=True)
        (copied / path).write_text("other")
        assert (found := results.build(HARDWARE)) not in seen
        seen.add(found)


def test_what_decides_a_figure_is_there():
    """And so is what those modules import of the package, but for kernels and reading weights."""
    package = Path(results.deit_fast.__file__).parent
    files = {name: package / f"{name}.py" for name in results.DECIDES}
    assert [name for name, file in files.items() if not file.exists()] == ["layers"]
    text = "".join(file.read_text() for name, file in files.items() if name != "layers")
    imported = re.findall(r"^from (?:deit_fast|\.)(?:\.| import )?(\w+)", text, re.MULTILINE)
    assert {"layers", "_cuda_graph", "activation_scales", "heads"} < set(imported)
    assert set(imported) <= {*results.DECIDES, "kernels", "checkpoint", "pretrained"}


def choice(**changes):
    row = {"op": "linear", "shape": {"M": 8, "K": 64}, "choice": {"implementation": "cublas"}}
    return row | {"ms": 1.0, "others": {"triton": 2.0}} | changes


def test_choices_count_and_not_their_tables_bytes(copied, tmp_path):
    def write(folder, *rows, **table):
        folder.mkdir(parents=True, exist_ok=True)
        content = {"gpu": HARDWARE["gpu"], "choices": rows, **table}
        (folder / "imaginary.json").write_text(json.dumps(content))
        return results.choices_digest(HARDWARE), results.build(HARDWARE)

    assert results.choices_digest(HARDWARE) is None
    plain, mine = results.build(HARDWARE), tmp_path / "cache" / "tuned"
    other = choice(shape={"K": 64, "M": 16})
    first = write(mine, choice(), other, date="2026-11-25")
    assert first[0] is not None and first[1] != plain
    slower = choice(ms=9.0, others={}, shape={"K": 64, "M": 8})
    assert write(mine, other, slower, date="2026-11-26") == first
    third = write(mine, choice(choice={"implementation": "triton"}), other)
    assert third[0] != first[0] and third[1] not in (plain, first[1])
    # shipped instead of the user's: the same choices; the user's come first
    (mine / "imaginary.json").unlink()
    assert write(copied / "kernels" / "tuned", choice(), other) == first
    assert write(mine, choice(choice={"implementation": "triton"})) == third
    (mine / "imaginary.json").write_text("no table")
    assert results.choices_digest(HARDWARE) == first[0]
    assert results.choices_digest(HARDWARE | {"gpu": None}) is None


def test_ratios_across_runs_go_by_the_baseline():
    """A clock that was 10% slower in the second run does not make its rows slower."""
    first = {"run": "1", "baseline": "eager_bf16"}
    second = first | {"run": "2"}
    base = model_row(DEIT, "eager_bf16", 100.0, speedup=1.0, **first)
    ours = model_row(DEIT, "deit_fast_bf16", 200.0, speedup=2.0, **first)
    later = model_row(DEIT, "compile_bf16", 135.0, speedup=1.5, **second)
    assert ratio(ours, base) == 2.0 and ratio(ours, model_row(DEIT)) is None
    assert ratio(ours, later) == pytest.approx(2.0 / 1.5)
    assert ratio(ours, replace(later, baseline="eager_fp32")) is None
    assert ratio(ours, replace(later, speedup=None)) is None
    assert ratio(ours, replace(later, build="c" * 12)) is None
    assert ratio(model_row(DEIT, images_per_s=300.0), model_row(DEIT)) == 3.0  # of no runs


def test_sources_are_all_of_deit_fasts(copied):
    seen = {results.sources()}
    kernels = results.kernel_digest()
    (copied / "bench" / "timing.py").write_text("other")
    seen.add(results.sources())
    assert results.kernel_digest() == kernels
    (copied / "kernels" / "__init__.py").write_text("other")
    assert results.kernel_digest() != kernels
    seen.add(results.sources())
    for path in ("kernels/attention/forward.py", "kernels/csrc/plan.h", "tune/linear.py"):
        (copied / path).parent.mkdir(parents=True)
        (copied / path).write_text("other")
        seen.add(results.sources())
    (copied / "kernels" / "tuned" / "imaginary.json").write_text("{}")
    seen.add(results.sources())
    assert len(seen) == 6


def test_commit_is_the_checkouts_or_the_environments(tmp_path, monkeypatch):
    git = shutil.which("git") or "false"
    head = subprocess.run(
        [git, "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert results.commit().removesuffix("-dirty") == (head or "unknown")
    monkeypatch.setattr(results.deit_fast, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delenv("DEIT_FAST_COMMIT", raising=False)
    assert results.commit() == "unknown"
    monkeypatch.setenv("DEIT_FAST_COMMIT", "c" * 40)
    assert results.commit() == "c" * 40
