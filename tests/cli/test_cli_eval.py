"""deit-fast eval --report and --calibrate, and classify with what they leave."""

import csv
import json
import shutil

import pytest
from saved_models import read, tiny
from small_runs import image_folders

import deit_fast
from deit_fast import calibration
from deit_fast.cli import main
from deit_fast.pretrained import from_pretrained


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    image_folders(folder / "data", each=4, splits=("val",))
    model = tiny(num_classes=3)
    model.pretrained_cfg["label_names"] = ["class0", "class1", "class2"]
    deit_fast.save_pretrained(model, folder / "model")
    return folder


@pytest.fixture
def model(made, tmp_path):
    return shutil.copytree(made / "model", tmp_path / "model")


def evaluate(made, model, *args):
    options = ("--model", str(model), "--workers", "0", *map(str, args))
    return main(["eval", str(made / "data"), *options])


def classify(made, model, *args):
    return main(["classify", str(made / "data"), "--model", str(model), *map(str, args)])


def test_report_and_calibration(made, model, tmp_path, capsys):
    out = tmp_path / "out" / "report"
    assert (
        evaluate(made, model, "--report", out, "--calibrate", "--keep", "0.5", "--json", "-") == 0
    )
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    how = calibration.of(from_pretrained(model))
    assert how is not None and figures["report"]["calibration"] == how.as_dict()
    assert f"temperature {how.temperature:.4f}" in printed.err
    assert f"unknown below {how.unknown.threshold:.4f} (max_logit)" in printed.err
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"] == how.as_dict() and "same images" in report["origin"]
    assert 100 * report["metrics"]["top1"] == pytest.approx(figures["top1"]["joint"])
    assert (out / "report.html").exists() and report["facts"]["Data"]["images"] == 12

    # the calibration is the folder's now; eval tells it from one found here, and keeps it
    before = read(model)
    assert evaluate(made, model, "--report", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert "comes with the model" in report["origin"] and read(model) == before


def test_without_calibration_there_is_none(made, model, tmp_path, capsys):
    assert evaluate(made, model, "--report", tmp_path / "out") == 0
    assert "calibration" not in read(model)
    assert "expected calibration error" in capsys.readouterr().out
    assert "was not calibrated" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("args, message", [
    (("--keep", "0"), "keep: 0.0, expected more than 0"),
    (("--calibrate", "--img-size", "32"), "--calibrate: with --img-size"),
    (("--report", "config.json"), "config.json is a file, expected a folder"),
])  # fmt: skip
def test_options_that_do_not_fit(made, model, args, message, capsys):
    args = [str(model / a) if a.endswith(".json") else a for a in args]
    assert evaluate(made, model, *args) == 2
    assert message in capsys.readouterr().err and "calibration" not in read(model)


def test_a_name_keeps_no_calibration(made, capsys):
    assert evaluate(made, "deit_tiny", "--calibrate") == 2
    assert "--calibrate: --model deit_tiny is no folder" in capsys.readouterr().err


def test_classify_says_unknown(made, model, tmp_path, capsys):
    assert evaluate(made, model, "--calibrate", "--keep", "0.5") == 0
    capsys.readouterr()
    assert classify(made, model, "--unknown", "--json") == 0
    entries = json.loads(capsys.readouterr().out)
    unknown = [entry["unknown"] for entry in entries]
    assert any(unknown) and not all(unknown)
    assert [bool(entry["predictions"]) for entry in entries] == [not u for u in unknown]
    assert classify(made, model, "--unknown", "--topk", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip() == "unknown" for line in lines) == sum(unknown)

    for suffix in ("csv", "jsonl"):
        out = tmp_path / f"classes.{suffix}"
        assert classify(made, model, "--unknown", "--out", out, "--workers", "0") == 0
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["unknown"] for row in rows] == [str(u).lower() for u in unknown]
    assert [row["label_1"] == "" for row in rows] == unknown
    lines = (tmp_path / "classes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == entries


def test_classify_with_a_threshold(made, model, tmp_path, capsys):
    assert classify(made, model, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert all("unknown" not in entry for entry in plain)
    best = sorted(entry["predictions"][0]["score"] for entry in plain)
    threshold = str((best[5] + best[6]) / 2)
    assert classify(made, model, "--json", "--threshold", threshold) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(entry["unknown"] for entry in found) == 6
    out = tmp_path / "plain.csv"
    assert classify(made, model, "--out", out, "--workers", "0") == 0
    assert "unknown" not in out.read_text().splitlines()[0], "only where asked"


@pytest.mark.parametrize("args, message", [
    (("--threshold", "50"), "--threshold: 50.0, expected 0 to 1"),
    (("--unknown",), "unknown: the model has no calibrated threshold"),
    (("--embed", "--unknown", "--out", "x.npy"), "--embed: features have no classes"),
])  # fmt: skip
def test_classify_options_that_do_not_fit(made, model, args, message, capsys):
    assert classify(made, model, *args) == 2
    assert message in capsys.readouterr().err
