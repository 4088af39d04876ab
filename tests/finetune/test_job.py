"""Plans of real data, teachers, seeds and times."""

import dataclasses
import json

import pytest
import small_runs
import torch

from deit_fast.distill import run_folder
from deit_fast.finetune import job


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_runs.image_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fast(monkeypatch):
    """A step that takes a second for each image."""
    monkeypatch.setattr(job, "seconds_per_image", lambda *args: 1.0)


def test_the_minutes_are_those_of_the_epochs(data, fast):
    planned = job.make_plan(small_runs.settings(data), {"epochs": 3})
    assert (planned.images, planned.validation, len(planned.classes)) == (24, 24, 3)
    assert planned.minutes == pytest.approx(3 * (24 + 24 / 3) / 60)


@pytest.mark.parametrize(
    ("seconds", "given", "epochs"),
    [(71.2, {}, 2), (1e9, {}, 60), (71.2, {"epochs": 50}, 50)],
)
def test_a_time_decides_the_epochs(data, fast, seconds, given, epochs):
    planned = job.make_plan(small_runs.settings(data), given, seconds=seconds)
    assert planned.plan.recipe.epochs == epochs
    assert planned.plan.recipe.warmup_epochs == epochs / 10


def test_too_little_time_for_an_epoch(data, fast):
    said = "time: 0.5 minutes, expected 0.6 or more: one epoch of 24 images takes about 0.5"
    with pytest.raises(ValueError, match=said):
        job.make_plan(small_runs.settings(data), {}, seconds=30)


def test_a_step_is_timed():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16, 2))
    model.pretrained_cfg = {"input_size": (3, 4, 4)}
    assert 0 < job.seconds_per_image(model, "none", 4, 8) < 10
    assert all(p.grad is None for p in model.parameters())


def test_a_plan_is_kept(data, fast, tmp_path):
    planned = job.make_plan(small_runs.settings(data), {})
    asked = {"time": "3m", "model": "deit_tiny"}
    assert job.kept_epochs(tmp_path, asked) is None
    job.write_plan(tmp_path, planned, asked)
    assert job.kept_epochs(tmp_path, asked) == planned.plan.recipe.epochs
    assert job.kept_epochs(tmp_path, asked | {"time": "4m"}) is None
    content = json.loads((tmp_path / job.PLAN).read_text())
    assert content["recipe"] == dataclasses.asdict(planned.plan.recipe)
    assert content["choices"][0]["why"] == "1000 / sqrt(24 images)"
    (tmp_path / job.PLAN).write_text("{")
    assert job.kept_epochs(tmp_path, asked) is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2", 120)]
)
def test_times(text, seconds):
    assert job.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1m", "0", "nan", "inf", "3d", "soon"])
def test_times_that_are_none(text):
    with pytest.raises(ValueError, match="time: .*, expected such as 90s, 30m or 2h"):
        job.seconds_of(text)


@pytest.mark.parametrize(
    ("model", "teacher"),
    [
        ("deit_tiny_distilled", "deit_small_distilled"),
        ("deit_tiny_distilled_patch16_224", "deit_small_distilled"),
        ("deit_base", "regnety_160"),
    ],
)
def test_the_larger_model_teaches(data, model, teacher):
    settings = small_runs.settings(data, model, start="pretrained")
    settings = dataclasses.replace(settings, model_args={}, img_size=None)
    found = job.teacher_settings(settings)
    assert (found.model, found.start, found.distill) == (teacher, "pretrained", "none")


def test_no_larger_model_is_known(data):
    for settings in (
        small_runs.settings(data, "vit_base_patch16_224", start="pretrained"),
        small_runs.settings(data, "deit_tiny", start="a folder"),
    ):
        with pytest.raises(ValueError, match="teacher: 'auto' for .*, expected one of deit_tiny,"):
            job.teacher_settings(settings)


def test_the_best_of_several_seeds(tmp_path):
    def run(folder, seed):
        (folder / run_folder.MODEL).mkdir(parents=True, exist_ok=True)
        (folder / run_folder.MODEL / "seed").write_text(str(seed))
        joint = {4: 50.0, 5: 70.0, 6: 70.0}[seed]
        top1 = {"class": 10.0 * seed, "joint": joint}
        return {"top1": top1, "images_per_s": 100.0 * seed, "unreadable": seed % 2}

    for _ in range(2):  # the second one takes the place of the first
        result = job.several(tmp_path, [4, 5, 6], run)
    assert result["best"] == 5 and (tmp_path / "model" / "seed").read_text() == "5"
    assert result["top1"] == {"class": 50.0, "joint": pytest.approx(190 / 3)}
    assert result["spread"]["class"] == 10.0 and result["images_per_s"] == 500
    assert json.loads((tmp_path / "result.json").read_text())["seeds"]["6"]["top1"]["joint"] == 70
    assert not (tmp_path / "model.part").exists()
