"""Temperature and threshold: the minimum, what is kept, and what has none."""

import json

import numpy as np
import pytest
from evaluations import drawn, evaluation
from saved_models import read, tiny

from deit_fast.calibration import Calibration, Unknown
from deit_fast.finetune import calibration
from deit_fast.finetune.evaluation import log_likelihood_loss
from deit_fast.pretrained import from_pretrained, save_pretrained


@pytest.mark.parametrize("sure", [0.2, 1.0, 3.0])
def test_the_temperature_minimises_the_likelihood_loss(sure):
    found = drawn(sure=sure)
    t = calibration.fit(found).temperature
    here = log_likelihood_loss(found, t)
    assert all(here <= log_likelihood_loss(found, t * by) for by in (0.98, 0.999, 1.001, 1.02))
    assert t == calibration.fit(found).temperature, "the same images, the same temperature"
    assert 0.8 < t / sure < 1.25, "from these logits the labels were drawn, divided by `sure`"


def test_no_temperature_where_everything_is_right():
    found = evaluation(np.eye(3) * 2, [0, 1, 2])
    assert calibration.fit(found).temperature == 1


def test_temperatures_end():
    """A prediction that is nearly always right, and always wrong."""
    logits = np.tile([0.001, 0.0], (2000, 1))
    assert calibration.temperature(logits, np.eye(2000, dtype=int)[7]) == calibration.LEAST
    assert calibration.temperature(logits, np.ones(2000, int)) == calibration.MOST


@pytest.mark.parametrize("keep, kept", [(0.95, 19), (0.9, 18), (1.0, 20), (0.01, 1)])
def test_the_threshold_keeps_a_share_of_the_correct_images(keep, kept):
    """20 right ones with largest logits 1 to 20, and wrong ones, which have no part in it."""
    logits = [[i, 0.0] for i in range(1, 21)] + [[100.0, 0.0], [0.5, 0.0]]
    found = evaluation(logits, [0] * 20 + [1, 1])
    how = calibration.fit(found, keep).unknown
    assert how.score == "max_logit" and how.threshold == 21 - kept
    assert how.kept == pytest.approx(kept / 20)
    shares = calibration.shares(found, how)
    assert shares["correct"] == how.kept and shares["wrong"] == 0.5
    assert shares["all"] == pytest.approx((kept + 1) / 22)


def test_energy_is_another_score():
    found = evaluation([[2.0, 0.0], [2.0, 1.9], [0.0, 1.0]], [0, 0, 1])
    how = calibration.fit(found, 1.0, "energy").unknown
    assert how.threshold == pytest.approx(float(np.log(1 + np.e)))
    with pytest.raises(ValueError, match="'energy' with heads 'joint_softmax'"):
        calibration.fit(evaluation([[0.0, 1.0]], [0], heads="joint_softmax"), score="energy")


def test_no_threshold_where_nothing_is_right():
    found = evaluation([[0.0, 1.0]], [0])
    assert calibration.fit(found).unknown is None
    assert "unknown" not in calibration.fit(found).as_dict()
    assert calibration.shares(found, Unknown("max_logit", 0.0, 1.0))["correct"] is None


@pytest.mark.parametrize("keep, score, match", [
    (0.0, "max_logit", "keep: 0.0, expected more than 0"),
    (1.5, "max_logit", "keep: 1.5"),
    (0.9, "softmax", "score: 'softmax', expected one of"),
])  # fmt: skip
def test_wrong_options(keep, score, match):
    with pytest.raises(ValueError, match=match):
        calibration.fit(drawn(), keep, score)


def test_a_folder_keeps_it(tmp_path):
    save_pretrained(tiny(), tmp_path)
    before = read(tmp_path)
    how = Calibration(1.5, Unknown("energy", -2.0, 0.95))
    calibration.store(tmp_path, how)
    assert read(tmp_path) == before | {"calibration": how.as_dict()}
    assert from_pretrained(tmp_path).pretrained_cfg["calibration"] == how.as_dict()
    for content in ("[]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json: (is no JSON|has no architecture)"):
            calibration.store(tmp_path, how)
        assert (tmp_path / "config.json").read_text() == content
    with pytest.raises(FileNotFoundError):
        calibration.store(tmp_path / "none", how)
    assert json.dumps(how.as_dict())
