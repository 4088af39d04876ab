"""The end of a run: calibration, report and card in its folder, and the same again."""

import json

import pytest
import yaml
from saved_models import read
from small_runs import image_folders, run

from deit_fast import calibration
from deit_fast.distill import run_folder
from deit_fast.distill.datasets import open_images
from deit_fast.finetune import card
from deit_fast.finetune.finish import finish
from deit_fast.pretrained import from_pretrained


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(image_folders(folder / "data"), folder / "out", recipe_of={"epochs": 2})
    return folder / "out"


def finished(out, **options):
    data = out.parent / "data"
    train, validation = (open_images(data, split) for split in ("train", "validation"))
    model = from_pretrained(out / "model").eval()
    return model, finish(out, model, validation, train=train, batch_size=8, **options)


def test_finish(out):
    model, report = finished(out, license="mit", facts={"More": {"seeds": 3}})
    assert report["metrics"]["images"] == 24 and len(report["log"]) == 2
    result = json.loads((out / "result.json").read_text())
    assert 100 * report["metrics"]["top1"] == pytest.approx(result["top1"]["joint"])
    how = calibration.of(from_pretrained(out / "model"))
    assert how is not None and how == calibration.of(model)
    assert how.as_dict() == report["calibration"] == read(out / "model")["calibration"]
    facts = report["facts"]
    assert facts["Data"]["training images"] == 24 and facts["More"] == {"seeds": 3}
    assert facts["Recipe"]["epochs"] == 2 and "torch" in facts["Versions"]
    page = (out / "report" / "report.html").read_text()
    assert "Training" in page and "top1/joint" in page
    text = (out / "model" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "mit" and header["pipeline_tag"] == "image-classification"
    assert header["library_name"] == "timm"
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == pytest.approx(round(report["metrics"]["top1"], 6))
    assert "class0, class1, class2" in text and "## Calibration" in text
    assert str(out) not in text + page, "no path of this machine"


def without_speed(path):
    return [line for line in path.read_text().splitlines() if "images/s" not in line]


def test_again_it_is_the_same_and_a_card_of_ones_own_stays(out):
    finished(out)
    files = [out / "model" / name for name in ("config.json", "README.md")]
    files += [out / "report" / name for name in ("predictions.csv", "confusion.csv")]
    before = [without_speed(path) for path in files]
    finished(out)
    assert [without_speed(path) for path in files] == before
    text = files[1].read_text()
    assert "license: other" in text and card.MARK in text
    files[1].write_text(text.replace(card.MARK, "") + "mine")
    finished(out)
    assert files[1].read_text().endswith("mine")


def test_a_run_that_is_not_through(out):
    with pytest.raises(FileNotFoundError, match=r"run: .*averaged has no config.json"):
        finished(out, weights="averaged")
    with pytest.raises(ValueError, match="keep: 2"):
        finished(out, keep=2)


def test_restart_empties_the_report(tmp_path):
    for name in ("report", "model", "mine"):
        (tmp_path / name).mkdir()
    run_folder.empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
