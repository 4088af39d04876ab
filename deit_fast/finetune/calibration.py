"""Find a model's temperature and its threshold for unknown images, on validation images.

**Temperature** (Guo et al. 2017, section 4.2): the one T that minimises the mean negative
log-likelihood of the labels under softmax(z / T). In b = 1 / T that is convex, with the derivative

    mean over images of  sum_i p_i z_i - z_label,   p = softmax(b z)

whose zero is found by bisection: the same pictures give the same T. Where the model classifies
every image correctly there is no zero, for b may grow for ever; T stays 1.

**Threshold**: of the images that the model classifies correctly, at least the share `keep` has a
score that is not below it; it is the largest such number. So images which the model has wrong, and
those of classes it does not know, have no part in it: no examples of unknown images are needed.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deit_fast.calibration import KEY, SCORES, Calibration, Unknown
from deit_fast.distill import run_folder
from deit_fast.stored_model import CONFIG

from .evaluation import Evaluation

KEEP = 0.95
LEAST, MOST = 0.01, 100.0  # temperatures: outside nothing is left of the logits, or no difference
HALVINGS = 60


def fit(found: Evaluation, keep: float = KEEP, score: str = "max_logit") -> Calibration:
    """Calibrate a model.

    Args:
        found: What the model makes of validation images, which it was not trained on.
        keep: Share of the correctly classified images, above 0 and up to 1, that stay known.
        score: One of `deit_fast.calibration.SCORES`.

    Returns:
        The temperature, from 0.01 to 100, and the threshold, none where no image is classified
        correctly.

    Raises:
        ValueError: For a share that is none, another score, and "energy" with the heads
            "joint_softmax", whose energy is 0 for every image.
    """
    check(keep, score)
    if score == "energy" and found.heads == "joint_softmax":
        raise ValueError(
            "score: 'energy' with heads 'joint_softmax', whose energy is 0 for every image, "
            "expected 'max_logit'"
        )
    unknown = None
    known = np.sort(found.scores(score)[found.correct])
    if len(known):
        # so many may lie below; rounded, or 0.95 of 20 images would be all of them
        below = min(int(round(len(known) * (1 - keep), 9)), len(known) - 1)
        threshold = float(known[below])
        unknown = Unknown(score, threshold, float((known >= threshold).mean()))
    return Calibration(temperature(found.logits, found.labels), unknown)


def check(keep: float, score: str) -> None:
    """Check the options of `fit`.

    Raises:
        ValueError: For options that do not fit.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep}, expected more than 0, and at most 1")
    if score not in SCORES:
        raise ValueError(f"score: {score!r}, expected one of {SCORES}")


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Find the temperature that minimises the negative log-likelihood.

    Args:
        logits: (n, classes).
        labels: int64 (n,).

    Returns:
        T, from 0.01 to 100; 1 where every image, or none, has its label as the largest logit.
    """
    right = logits.argmax(1) == labels
    if right.all() or logits.shape[1] < 2:
        return 1.0
    z = logits.astype(np.float64)
    z -= z.max(1, keepdims=True)
    own = z[np.arange(len(z)), labels]

    def slope(b: float) -> float:
        e = np.exp(b * z)
        return float(((e * z).sum(1) / e.sum(1) - own).mean())

    low, high = 1 / MOST, 1 / LEAST
    if slope(low) >= 0:
        return MOST
    if slope(high) <= 0:
        return LEAST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def shares(found: Evaluation, unknown: Unknown) -> Mapping[str, float | None]:
    """Return which share of some images, 0 to 1, a threshold keeps.

    Returns:
        {"all", "correct", "wrong"}: of the images, of those that the model has right, of those it
        has wrong; None where there are none.
    """
    known = found.scores(unknown.score) >= unknown.threshold
    groups = {"all": np.ones_like(known), "correct": found.correct, "wrong": ~found.correct}
    return {name: float(known[of].mean()) if of.any() else None for name, of in groups.items()}


def store(folder: str | Path, calibration: Calibration) -> None:
    """Write a calibration into the config.json of a folder of weights, whole or not at all.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: It is no model's.
        OSError: It can't be written.
    """
    path = Path(folder, CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"{path}: has no architecture, expected a folder of save_pretrained")
    run_folder.write_json(path, config | {KEY: calibration.as_dict()})
