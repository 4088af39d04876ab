"""A model's calibration: kept with the model, and used by what predicts."""

import math

import numpy as np
import pytest
import torch
from checking import assert_close, seeded
from saved_models import read, tiny, write

import deit_fast
from deit_fast import batch_inference, calibration, predictions
from deit_fast.calibration import Calibration, Unknown
from deit_fast.export import metadata
from deit_fast.pretrained import from_pretrained, save_pretrained

HOW = Calibration(2.0, Unknown("max_logit", 0.5, 0.95))


def calibrated(how=HOW, **kwargs):
    model = tiny(**kwargs)
    calibration.attach(model, how)
    return model


def pixels(count=6):
    draw = np.random.default_rng(seeded(0))
    return draw.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("how", [HOW, Calibration(0.3)])
def test_folders_keep_it(how, tmp_path):
    save_pretrained(calibrated(how), tmp_path)
    assert read(tmp_path)["calibration"] == how.as_dict()
    again = from_pretrained(tmp_path)
    assert calibration.of(again) == how
    save_pretrained(again, tmp_path / "more")
    assert calibration.of(from_pretrained(tmp_path / "more")) == how
    save_pretrained(tiny(), tmp_path)
    assert "calibration" not in read(tmp_path) and calibration.of(from_pretrained(tmp_path)) is None


def test_quantized_models_keep_it(tmp_path):
    model = calibrated()
    deit_fast.quantize(model, "int8")
    save_pretrained(model, tmp_path)
    assert calibration.of(from_pretrained(tmp_path)) == HOW


def test_exported_files_say_it():
    model = calibrated()
    assert metadata(model)["calibration"].startswith('{"temperature": 2.0, "unknown": {"score"')
    model.pretrained_cfg["label_names"] = ("a", "<b>")
    assert metadata(model)["label_names"] == '["a", "<b>"]'
    assert metadata(torch.nn.Linear(1, 1)) == {}


def test_it_is_left_out_where_it_does_not_hold(tmp_path):
    save_pretrained(calibrated(), tmp_path)
    for options in ({"heads": "class"}, {"img_size": 32}):
        with pytest.warns(UserWarning, match="its calibration is left out, for it does not hold"):
            assert calibration.of(from_pretrained(tmp_path, **options)) is None
    assert calibration.of(from_pretrained(tmp_path, heads="joint")) == HOW
    assert calibration.of(from_pretrained(tmp_path, num_classes=3)) is None  # begins anew
    model = from_pretrained(tmp_path)
    deit_fast.set_heads(model, "joint")
    assert calibration.of(model) == HOW
    with pytest.warns(UserWarning, match="heads: 'class', but the model's calibration is of"):
        deit_fast.set_heads(model, "class")
    assert calibration.of(model) is None


@pytest.mark.parametrize("stored", [
    [], {}, {"temperature": "warm"}, {"temperature": 0}, {"temperature": math.inf},
    {"temperature": 1, "unknown": {}}, {"temperature": 1, "unknown": {"score": "max_logit"}},
    {"temperature": 1, "unknown": {"score": "softmax", "threshold": 1}},
])  # fmt: skip
def test_a_wrong_one_is_refused(stored, tmp_path):
    save_pretrained(tiny(), tmp_path)
    write(tmp_path, calibration=stored)
    with pytest.raises(ValueError, match="config.json: calibration: "):
        from_pretrained(tmp_path)


def test_attaching_leaves_the_configuration_of_others_alone():
    a, b = tiny(), tiny()
    b.pretrained_cfg = a.pretrained_cfg
    calibration.attach(a, HOW)
    assert calibration.of(b) is None


@pytest.mark.parametrize("heads", ["joint", "joint_softmax"])
def test_scores_are_at_the_temperature(heads):
    plain, model = tiny(heads=heads), calibrated(heads=heads)
    x = pixels()
    before = batch_inference.Predictor(plain, 8, topk=11)(x)
    after = batch_inference.Predictor(model, 8, topk=11)(x)
    assert (before["classes"] == after["classes"]).all() and "unknown" not in after
    p = torch.from_numpy(before["scores"]).sqrt()  # softmax(z / 2) is the root of softmax(z), to 1
    assert_close(torch.from_numpy(after["scores"]), p / p.sum(1, keepdim=True))


def entries(model, x, **options):
    columns = batch_inference.Predictor(model, 8, topk=3, **options)(x)
    batch = batch_inference.Batch(["a", *map(str, range(len(x)))], ["no image"] + [None] * len(x))
    batch.columns = columns
    return list(predictions.entries(batch, [f"class{i}" for i in range(11)]))


def test_a_threshold_keeps_probable_classes():
    x, model = pixels(), tiny()
    plain = entries(model, x)[1:]
    scores = sorted(p["score"] for entry in plain for p in entry["predictions"])
    threshold = (scores[len(scores) // 2] + scores[len(scores) // 2 + 1]) / 2
    found = entries(model, x, threshold=threshold)
    assert found[0] == {"image": "a", "error": "no image"}
    for before, after in zip(plain, found[1:], strict=True):
        kept = [p for p in before["predictions"] if p["score"] >= threshold]
        assert after["predictions"] == kept and after["unknown"] == (not kept)
    assert {entry["unknown"] for entry in entries(model, x, threshold=1.0)[1:]} == {True}


@pytest.mark.parametrize("score", calibration.SCORES)
def test_unknown_images_have_no_prediction(score):
    x = pixels()
    predictor = batch_inference.Predictor(tiny(), 8)
    logits = predictor.engine(torch.from_numpy(x))
    by_hand = {"max_logit": logits.amax(1), "energy": logits.logsumexp(1)}[score]
    middle = by_hand.sort().values[2:4].mean().item()
    model = calibrated(Calibration(1.0, Unknown(score, middle, 1.0)))
    found = entries(model, x, unknown=True)[1:]
    assert [e["unknown"] for e in found] == (by_hand < middle).tolist()
    assert [len(e["predictions"]) for e in found] == [0 if e["unknown"] else 3 for e in found]
    assert sum(e["unknown"] for e in found) == 3
    assert entries(model, x) == entries(calibrated(Calibration()), x), "only where asked"


def test_wrong_options():
    with pytest.raises(ValueError, match="threshold: 50, expected 0 to 1"):
        batch_inference.Predictor(tiny(), 8, threshold=50)
    for model in (tiny(), calibrated(Calibration(2.0))):
        with pytest.raises(ValueError, match="unknown: the model has no calibrated threshold"):
            batch_inference.Predictor(model, 8, unknown=True)
