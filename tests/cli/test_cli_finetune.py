"""deit-fast finetune: a plan and a model from a folder."""

import json

import pytest
import small_runs

from deit_fast.cli import main
from deit_fast.finetune import job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_runs.image_folders(tmp_path_factory.mktemp("data") / "Bäume im Park", size=28)


def finetune(data, out, *options):
    return main(["finetune", str(data), "--from", "nano", "--workers", "0", *options,
                 *([] if out is None else ["--out", str(out)])])  # fmt: skip


def test_a_dry_run_prints_the_plan_and_writes_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finetune(data, None, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "24 images to train on, 24 to evaluate on, 3 classes" in said
    assert "1000 / sqrt(24 images)" in said and "expected: " in said
    assert not list(tmp_path.iterdir())


def test_nothing_but_the_folder(data, tmp_path, capsys, monkeypatch):
    """What is left out has a default; the same command again says the result at once."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert finetune(data, None, "--epochs", "4") == 0
        assert "runs/Bäume im Park: top-1 class" in capsys.readouterr().out
    out = tmp_path / "runs" / "Bäume im Park"
    plan = json.loads((out / job.PLAN).read_text())
    assert plan["recipe"]["epochs"] == 4 and plan["recipe"]["warmup_epochs"] == 0.4
    assert json.loads((out / "result.json").read_text())["top1"]["joint"] > 80


def test_a_run_with_a_time_goes_on_with_the_epochs_it_began_with(
    data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(job, "seconds_per_image", lambda *args: 1.0)
    assert finetune(data, tmp_path / "out", "--time", "72s") == 0
    monkeypatch.setattr(job, "seconds_per_image", lambda *args: 0.1)
    assert finetune(data, tmp_path / "out", "--time", "72s") == 0
    assert json.loads((tmp_path / "out" / job.PLAN).read_text())["recipe"]["epochs"] == 2
    assert finetune(data, tmp_path / "out", "--time", "72s", "--restart", "--dry-run") == 0
    assert capsys.readouterr().out.count("epochs             20 ") == 1


def test_several_seeds(data, tmp_path, capsys):
    assert finetune(data, tmp_path, "--epochs", "1", "--runs", "2", "--seed", "3") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["seeds"]) == {"3", "4"} and result["best"] in (3, 4)
    assert (tmp_path / "model" / "config.json").exists()
    assert len(capsys.readouterr().out.split("images/s in training")) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--runs", "0"], "--runs: 0, expected 1 or more"),
        (["--recipe", "deit", "--time", "3m"], "--time: with --recipe deit, expected --recipe"),
        (["--recipe", "deit", "--dry-run"], "--dry-run: with --recipe deit, expected"),
        (["--time", "soon"], "time: 'soon', expected such as 90s, 30m or 2h"),
        (["--teacher", "auto"], "teacher: 'auto' for "),
    ],
)  # fmt: skip
def test_options_that_make_no_run(data, tmp_path, capsys, options, said):
    assert finetune(data, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
