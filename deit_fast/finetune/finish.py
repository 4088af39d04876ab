"""What a run ends with: its model evaluated and calibrated, a report and a model card."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from deit_fast import calibration as stored
from deit_fast.distill import run_folder
from deit_fast.distill.datasets import ImageSet
from deit_fast.quantization import quantized_layers
from deit_fast.stored_model import CONFIG

from . import calibration, card, report
from .evaluation import Evaluation, evaluate

ORIGIN = (
    "It was found on these same images, so its calibration error there is a little lower than on "
    "others."
)


def finish(
    run: str | Path, model: nn.Module, validation: ImageSet, *, train: ImageSet | None = None,
    batch_size: int = 64, workers: int = 0, keep: float = calibration.KEEP,
    score: str = "max_logit", license: str | None = None, weights: str = run_folder.MODEL,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict:  # fmt: skip
    """Evaluate and calibrate the model of a run, and write its report and its model card.

    The same call again writes the same: what an interruption left unwritten is made up for.

    Args:
        run: The run's folder, see `deit_fast.distill.run_folder`. The report goes to its report/,
            the calibration into config.json of its model/, the card beside that.
        model: What model/ holds, in eval mode, where it is to compute. It gets the calibration too.
        validation: The images that the run did not train on.
        train: Those it did, for the facts.
        batch_size: Images in a forward pass.
        workers: Processes that decode; 0: this one.
        keep: See `calibration.fit`.
        score: See `calibration.fit`.
        license: See `card.write_card`.
        weights: The folder of the weights in the run's, "model" or "model-ema".
        facts: More tables for report and card, {heading: {what: value}}.
        progress: Told how many images are evaluated.

    Returns:
        The content of report.json.

    Raises:
        FileNotFoundError: The folder has no weights.
        ValueError: Options, model and images do not fit.
        FloatingPointError: A logit is not finite.
        OSError: Something can't be written.
    """
    run = Path(run)
    folder = run / weights
    calibration.check(keep, score)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"run: {folder} has no {CONFIG}, expected a run that is through")
    found = evaluate(model, validation, batch_size=batch_size, workers=workers, progress=progress)
    calibrated = calibration.fit(found, keep, score)
    settings, about = read(run / run_folder.SETTINGS), read(run / run_folder.RUN)
    tables = _facts(run, found, model, validation, train, settings, about) | dict(facts or {})
    named = about.get("model") or type(model).__name__
    result = report.write_report(
        run / run_folder.REPORT, tables, found, model, validation,
        title=f"{run.name}: {named}",
        about=f"{named}, evaluated on {len(found.labels):,} validation images "
        "that it was not trained on.",
        calibration=calibrated, origin=ORIGIN, log=read_log(run / run_folder.LOG),
    )  # fmt: skip
    card.write_card(
        folder, result, name=run.name, license=license, quantized=bool(quantized_layers(model))
    )
    calibration.store(folder, calibrated)
    stored.attach(model, calibrated)
    return result


def _facts(
    run: Path, found: Evaluation, model: nn.Module, validation: ImageSet, train: ImageSet | None,
    settings: Mapping, about: Mapping,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    data = {} if train is None else {
        f"training {k}": v for k, v in report.counts(train, found.classes).items()
    }  # fmt: skip
    data |= {f"validation {k}": v for k, v in report.counts(validation, found.classes).items()}
    data["unreadable in the run"] = len(read_log(run / run_folder.UNREADABLE))
    what = {k: v for k, v in about.items() if v is not None}
    what["parameters"] = what.pop("params", sum(p.numel() for p in model.parameters()))
    what |= {"heads": found.heads, "began from weights": bool(
        (settings.get("settings") or {}).get("start"))}  # fmt: skip
    result = read(run / run_folder.RESULT)
    speed = {}
    if "images_per_s" in result:
        speed = {
            "training, images/s": round(result["images_per_s"], 1),
            "training, minutes": round(result.get("seconds", 0) / 60, 2),
        }
    if found.seconds:
        speed["evaluation, images/s"] = round(len(found.labels) / found.seconds, 1)
    return {
        "Data": data, "Model": what, "Speed": speed, "Recipe": settings.get("recipe") or {},
        "Versions": report.versions(),
    }  # fmt: skip


def read(path: Path) -> dict:
    """The content of a JSON file of a run; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file of a run, numbers as such; none where there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{k: _number(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
