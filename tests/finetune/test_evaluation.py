"""Evaluations: logits are the model's, and metrics are those of their definitions."""

import numpy as np
import pytest
import torch
from checking import assert_close
from evaluations import Noise, drawn, evaluation
from saved_models import tiny

from deit_fast.distill.evaluate import batches
from deit_fast.finetune import evaluation as ours
from deit_fast.kernels.classifier import FUSIONS

CLASSES = ["a", "b", "c"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_are_what_the_model_returns(fusion):
    model = tiny(num_classes=3, heads=fusion)
    images = Noise([0, 1, 2, 1, 0], CLASSES, broken=(3,))
    found = ours.evaluate(model, images, batch_size=2)
    assert found.skipped == [("3.png", "cannot identify <image> file")]
    assert found.names == ["0.png", "1.png", "2.png", "4.png"] and found.heads == fusion
    assert found.labels.tolist() == [0, 1, 2, 0] and found.logits.dtype == np.float32
    with torch.no_grad():
        said = torch.cat([model(x) for _, x in batches(model, images, 9, 0, [])])
    expected = said / 2 if fusion == "joint_softmax" else said.softmax(-1)
    assert_close(torch.from_numpy(found.probabilities()).float(), expected)


def test_classes_in_another_order_are_refused():
    model = tiny(num_classes=3)
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"label_names": ["c", "b", "a"]}
    with pytest.raises(ValueError, match="images: classes in the order a, b, c"):
        ours.evaluate(model, Noise([0], CLASSES))
    named = Noise([0, 1, 2], ["n01", "n02", "n03"])  # ImageNet's folders are named otherwise
    assert ours.evaluate(model, named).classes == ["c", "b", "a"]


def test_nothing_readable_and_logits_that_are_not_finite():
    model = tiny(num_classes=3)
    with pytest.raises(ValueError, match=r"images: none of 1 could be read \(0.png"):
        ours.evaluate(model, Noise([0], CLASSES, broken=(0,)))
    model.head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logit of head joint is not finite"):
        ours.evaluate(model, Noise([0], CLASSES))


# rows: labels. 2 of 3 a's right, both b's, no c; d was never predicted
LABELS, PREDICTED = [0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 1, 0]


def test_metrics_by_hand():
    found = evaluation(np.eye(4)[PREDICTED] * 5, LABELS)
    matrix = ours.confusion(found)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    got = {name: values.tolist() for name, values in ours.per_class(matrix).items()}
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert got["precision"] == [pytest.approx(2 / 3), pytest.approx(2 / 3), nan, nan]
    assert got["recall"] == [pytest.approx(2 / 3), 1.0, nan, 0.0]
    assert got["f1"] == [pytest.approx(2 / 3), pytest.approx(0.8), nan, 0.0]
    assert got["support"] == [3, 2, 0, 1]
    figures = ours.metrics(found)
    assert figures["top1"] == pytest.approx(4 / 6) and "top5" not in figures
    assert figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 0.8 + 0) / 3)
    assert figures["images_per_s"] == 3.0 and "after" not in figures


def test_top5_counts_the_five_best():
    logits = np.tile(np.arange(7.0), (7, 1))
    assert ours.metrics(evaluation(logits, range(7)))["top5"] == pytest.approx(5 / 7)


def test_calibration_error_and_likelihood_by_hand():
    """Two images at 0.9, one right; one at 0.6, right."""
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    found = evaluation(np.log(p), [0, 1, 1])
    bins = ours.reliability(found)
    assert sum(bins["count"]) == 3 and bins["count"][13] == 2 and bins["accuracy"][13] == 0.5
    error = ours.calibration_error(bins)
    assert error == pytest.approx((2 * 0.4 + 0.4) / 3)
    loss = ours.log_likelihood_loss(found)
    assert loss == pytest.approx(-np.log([0.9, 0.1, 0.6]).mean())


def test_bins_have_all_confidences():
    found = evaluation([[0.0, 0.0], [200.0, 0.0]], [0, 0])
    count = ours.reliability(found)["count"]
    assert count[7] == 1 and count[14] == 1, "0.5 is in the middle, 1 in the last bin"


def test_the_interval_is_wilsons():
    """Against the roots of (p - share)^2 = z^2 p (1 - p) / n, which it is defined by."""
    for hits, total in ((0, 10), (45, 90), (90, 90)):
        low, high = ours.interval(hits, total)
        z2, share = ours.Z95**2, hits / total
        roots = np.roots([1 + z2 / total, -(2 * share + z2 / total), share**2]).real
        assert (low, high) == (pytest.approx(max(min(roots), 0)), pytest.approx(max(roots)))


def test_labels_drawn_from_the_probabilities_are_calibrated():
    found = drawn(images=4000, sure=1.0)
    figures = ours.metrics(found, 3.0)
    assert figures["before"]["ece"] < 0.04 < figures["after"]["ece"]
