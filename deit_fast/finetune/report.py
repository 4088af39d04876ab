"""The report on a model: a page for people, and the same as JSON and CSV for programs.

What `write_report` leaves:

    report.html        one page that needs nothing beside itself
    report.json        every figure of it
    predictions.csv    an image a row: label, prediction, probability, score for unknown images
    per_class.csv      precision, recall, F1 of each class
    confusion.csv      labels (rows) against predictions (columns)
"""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import deit_fast
from deit_fast.calibration import Calibration
from deit_fast.distill import run_folder
from deit_fast.distill.checkpoints import write_atomically
from deit_fast.distill.datasets import ImageSet

from . import calibration as calibrations
from . import evaluation, report_page, thumbnails
from .evaluation import Evaluation

PAGE, JSON, PREDICTIONS = "report.html", "report.json", "predictions.csv"
PER_CLASS, CONFUSION = "per_class.csv", "confusion.csv"
FORMAT = 1
CASES = 12  # images of each kind that are shown
FEW = 100  # images, below which the figures are rough
LISTED = 100  # confusions in report.json


def write_report(
    folder: str | Path, facts: Mapping[str, Mapping[str, Any]], found: Evaluation,
    model: nn.Module, images: ImageSet, *, title: str, about: str = "",
    calibration: Calibration | None = None, origin: str = "",
    log: Sequence[Mapping[str, Any]] = (),
) -> dict:  # fmt: skip
    """Write the report on a model; each file is whole or not there.

    Args:
        folder: Is made where it is missing.
        facts: {heading: {what: value}}, tables about data, recipe, versions. Values as JSON has.
        found: What the model makes of the images (`evaluation.evaluate`).
        model: In eval mode: it draws the attention maps.
        images: Those that were evaluated.
        title: The page's.
        about: A sentence or two below it.
        calibration: The model's; None: it has none.
        origin: A sentence that says on what images it was found.
        log: Rows of a run's log.csv; none: no curves.

    Returns:
        The content of report.json.

    Raises:
        FileExistsError: The folder is a file.
        OSError: Something can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temperature = 1.0 if calibration is None else calibration.temperature
    matrix = evaluation.confusion(found)
    report = _content(found, matrix, calibration) | {
        "title": title, "about": about, "origin": origin, "log": [dict(row) for row in log],
        "facts": {name: dict(of) for name, of in facts.items()},
        "setting": _setting(model),
    }  # fmt: skip
    cases = {kind: _cases(found, rows, calibration)
             for kind, rows in _chosen(found, temperature).items()}  # fmt: skip
    numbers = [case["number"] for some in cases.values() for case in some]
    pictures = thumbnails.draw(model, images, numbers)
    scores = {}
    if calibration is not None and calibration.unknown is not None:
        every = found.scores(calibration.unknown.score)
        scores = {"correct": every[found.correct].tolist(), "wrong": every[~found.correct].tolist()}
    page = report_page.render(report, matrix, scores, cases, pictures)

    run_folder.write_csv(folder / PREDICTIONS, predictions(found, calibration))
    run_folder.write_csv(folder / PER_CLASS, [_words(row) for row in report["classes"]])
    _write_confusion(folder / CONFUSION, found.classes, matrix)
    run_folder.write_json(folder / JSON, report)
    write_atomically(folder / PAGE, lambda file: file.write(page.encode()))
    return report


def _content(found: Evaluation, matrix: np.ndarray, calibration: Calibration | None) -> dict:
    """What follows from an evaluation, as JSON has it."""
    temperature = None if calibration is None else calibration.temperature
    bins = {"before": evaluation.reliability(found)}
    if temperature is not None:
        bins["after"] = evaluation.reliability(found, temperature)
    kept = None
    if calibration is not None and calibration.unknown is not None:
        kept = dict(calibrations.shares(found, calibration.unknown))
    values = {k: v.tolist() for k, v in evaluation.per_class(matrix).items()}
    classes = [
        {"class": name} | {k: None if v[i] != v[i] else v[i] for k, v in values.items()}
        for i, name in enumerate(found.classes)
    ]
    return {
        "format": FORMAT, "metrics": evaluation.metrics(found, temperature),
        "calibration": None if calibration is None else calibration.as_dict(), "kept": kept,
        "reliability": bins, "classes": classes, "confusions": _confusions(found.classes, matrix),
        "notes": _notes(found, matrix, calibration),
        "skipped": [list(pair) for pair in found.skipped],
        "heads": found.heads,
    }  # fmt: skip


def _confusions(classes: Sequence[str], matrix: np.ndarray) -> list[dict]:
    """The most frequent wrong pairs, most first."""
    wrong = matrix - np.diag(np.diag(matrix))
    flat = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    return [
        {"label": classes[i], "predicted": classes[j], "count": int(wrong[i, j]),
         "share": float(wrong[i, j] / matrix[i].sum())}
        for i, j in (divmod(int(place), len(classes)) for place in flat)
        if wrong[i, j]
    ]  # fmt: skip


def _notes(found: Evaluation, matrix: np.ndarray, calibration: Calibration | None) -> list[str]:
    """What limits the figures."""
    notes = []
    if found.skipped:
        notes.append(f"Images that could not be read and are left out: {len(found.skipped):,}.")
    if len(found.labels) < FEW:
        notes.append(
            f"Only {len(found.labels)} images: the figures are rough, those of single classes more "
            "so."
        )
    if missing := [found.classes[i] for i in np.flatnonzero(matrix.sum(1) == 0)]:
        notes.append(
            f"Classes without an image, of which nothing is known here: {len(missing):,} "
            f"({report_page.said(missing[:5])}{', ...' if len(missing) > 5 else ''})."
        )
    if calibration is not None and found.correct.all() and calibration.temperature == 1:
        notes.append("Every image is classified correctly: no temperature fits, it stays 1.")
    if calibration is not None and not (
        calibrations.LEAST < calibration.temperature < calibrations.MOST
    ):
        notes.append("The temperature is at the end of its range: the logits say little.")
    if calibration is not None and calibration.unknown is None:
        notes.append("No image is classified correctly: there is no threshold for unknown ones.")
    return notes


def _chosen(found: Evaluation, temperature: float) -> dict[str, list[int]]:
    """Rows of the images to show: confident errors, and the least probable best classes."""
    best = found.probabilities(temperature).max(1)
    wrong = [int(i) for i in np.argsort(-best, kind="stable") if not found.correct[i]][:CASES]
    unsure = [int(i) for i in np.argsort(best, kind="stable") if int(i) not in wrong][:CASES]
    return {"wrong": wrong, "unsure": unsure}


def _cases(found: Evaluation, rows: Sequence[int], calibration: Calibration | None) -> list[dict]:
    p = found.probabilities(1.0 if calibration is None else calibration.temperature)
    scores = threshold = None
    if calibration is not None and calibration.unknown is not None:
        scores = found.scores(calibration.unknown.score)
        threshold = calibration.unknown.threshold
    cases = []
    for i in rows:
        first, *others = np.argsort(-p[i], kind="stable")[:2]
        cases.append({
            "number": int(found.numbers[i]), "image": found.names[i],
            "label": found.classes[found.labels[i]], "predicted": found.classes[first],
            "probability": float(p[i, first]),
            "second": found.classes[others[0]] if others else None,
            "second_probability": float(p[i, others[0]]) if others else None,
            "unknown": scores is not None and bool(scores[i] < threshold),
        })  # fmt: skip
    return cases


def predictions(found: Evaluation, calibration: Calibration | None) -> list[dict]:
    """Return the rows of predictions.csv.

    Returns:
        Of each image "image", "label", "predicted", "probability", "correct", and with a calibrated
        threshold "unknown_score" and "unknown".
    """
    p = found.probabilities(1.0 if calibration is None else calibration.temperature)
    rows: list[dict] = [
        {"image": name, "label": found.classes[label], "predicted": found.classes[best],
         "probability": f"{p[i, best]:.6f}", "correct": int(label == best)}
        for i, (name, label, best) in enumerate(
            zip(found.names, found.labels, found.predicted, strict=True))
    ]  # fmt: skip
    if calibration is not None and calibration.unknown is not None:
        how = calibration.unknown
        for row, score in zip(rows, found.scores(how.score), strict=True):
            row |= {"unknown_score": f"{score:.6f}", "unknown": int(score < how.threshold)}
    return rows


def _words(row: Mapping) -> dict:
    """A row of a CSV file, empty where something is undefined."""
    shown = {k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()}
    return {k: "" if v is None else v for k, v in shown.items()}


def _write_confusion(path: Path, classes: Sequence[str], matrix: np.ndarray) -> None:
    # by number: two classes may have one name
    rows = [dict(enumerate([classes[i], *matrix[i].tolist()])) for i in range(len(classes))]
    run_folder.write_csv(path, [dict(enumerate(["label", *classes])), *rows], header=False)


def _setting(model: nn.Module) -> str:
    like = next(model.parameters())
    device = torch.cuda.get_device_name(like.device) if like.is_cuda else "CPU"
    return f"{str(like.dtype).removeprefix('torch.')} on {device}"


def versions() -> dict[str, str]:
    """Versions of what computed this, for `facts`."""
    found = {"deit_fast": deit_fast.__version__, "Python": platform.python_version()}
    for name in ("torch", "timm", "numpy", "pillow", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def counts(images: ImageSet, classes: Sequence[str]) -> dict[str, Any]:
    """Facts about a set of images: how many, of how many classes, the smallest and the largest."""
    number = np.bincount(images.labels, minlength=len(classes))
    low, high = int(number.argmin()), int(number.argmax())
    return {
        "images": len(images), "classes": len(classes),
        "smallest class": f"{classes[low]}: {number[low]:,}",
        "largest class": f"{classes[high]}: {number[high]:,}",
    }  # fmt: skip
