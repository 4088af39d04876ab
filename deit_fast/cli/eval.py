"""What `deit-fast eval` does; its options are in parsers/eval.py."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from deit_fast import calibration as stored
from deit_fast.distill import evaluate, real
from deit_fast.distill.datasets import ImageSet
from deit_fast.finetune import calibration, evaluation, report
from deit_fast.stored_model import CONFIG

from . import _data, _json, _models

HERE = (
    "It was found on these same images, so its calibration error there is a little lower than on "
    "others."
)
BEFORE = "It comes with the model: it was not found on these images."


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the figures; returns the exit code."""
    with _json.output(args.json) as write:
        return _run(args, write)


def _run(args: argparse.Namespace, write: Callable[[Any], None]) -> int:
    setting = _data.setting(args)
    _check(args)
    labels = None if args.real is None else real.read_real_labels(args.real)
    model = _models.load(args, strict=False)
    images = _data.images_for(model, args)
    evaluate.check(model, images)
    if labels is not None:
        labels = real.real_truths(labels, map(images.name, range(len(images))))
    model.to(setting.device, _models.DTYPES[setting.dtype])
    keeps_logits = args.report is not None or args.calibrate
    predict = evaluation.evaluate if keeps_logits else evaluate.predictions
    with _data.progress(len(images)) as progress:
        found: evaluate.Predictions = predict(
            model, images, batch_size=setting.batch, workers=setting.workers, progress=progress
        )
    accuracy = found.accuracy()
    result = {
        "model": args.model, "data": args.data, "split": args.split, "images": accuracy.images,
        "skipped": [list(pair) for pair in found.skipped], **accuracy.percent(),
        "images_per_s": accuracy.images / found.seconds, **setting._asdict(),
    }  # fmt: skip
    columns = {"top-1": result["top1"], "top-5": result["top5"]}
    if labels is not None:
        by_real = found.accuracy([labels[i] for i in found.numbers])
        result["real"] = {"images": by_real.images, **by_real.percent()}
        columns["ReaL top-1"] = result["real"]["top1"]
    rows = [(head, *(f"{c[head]:.2f}" for c in columns.values())) for head in found.top]
    _data.show(f"{args.model} on {args.data}, %", ("head",), tuple(columns), rows)
    print(f"{accuracy.images:,} images in {found.seconds:.1f} s, {result['images_per_s']:,.1f} "
          f"images/s ({setting.dtype} on {setting.device}, decoding included, "
          f"{setting.workers} workers)")  # fmt: skip
    if setting.device == "cpu":
        print("This speed is a CPU's: deit_fast runs plain PyTorch there.")
    if labels is not None:
        print(f"ReaL: {by_real.images:,} of these images have a label")
    if isinstance(found, evaluation.Evaluation):
        result["report"] = _more(args, model, images, found)
    write(result)
    return _data.report_skipped(found.skipped)


def _check(args: argparse.Namespace) -> None:
    """Check what can be checked before a model is loaded."""
    calibration.check(args.keep, args.unknown_score)
    if args.report is not None and args.report.exists() and not args.report.is_dir():
        raise FileExistsError(f"--report: {args.report} is a file, expected a folder")
    if not args.calibrate:
        return
    config = Path(args.model, CONFIG)
    if not config.is_file():
        raise ValueError(
            f"--calibrate: --model {args.model} is no folder with a {CONFIG}, which would keep the "
            "calibration"
        )
    if not os.access(config, os.W_OK) or not os.access(config.parent, os.W_OK):
        raise PermissionError(f"--calibrate: {config} can't be written")
    if args.img_size is not None:
        raise ValueError("--calibrate: with --img-size, expected the model's own size")


def _more(
    args: argparse.Namespace, model: nn.Module, images: ImageSet, found: evaluation.Evaluation
) -> dict:
    """Calibrate and report; returns what --json gets of it."""
    how = stored.of(model)
    if args.calibrate:
        how = calibration.fit(found, args.keep, args.unknown_score)
    temperature = None if how is None else how.temperature
    figures = evaluation.metrics(found, temperature)
    before, after = figures["before"], figures.get("after")
    print(f"balanced accuracy {100 * figures['balanced_accuracy']:.2f}%, macro F1 "
          f"{100 * figures['macro_f1']:.2f}%")  # fmt: skip
    said = f"expected calibration error {100 * before['ece']:.2f}%"
    if after is not None:
        said += f", {100 * after['ece']:.2f}% at the temperature {temperature:.4f}"
    print(said)
    if args.report is not None:
        report.write_report(
            args.report, _facts(args, model, images, found), found, model, images,
            title=f"{args.model} on {args.data}", calibration=how,
            about=f"{len(found.labels):,} images" + (
                f", split {args.split}." if args.split else "."),
            origin=HERE if args.calibrate else BEFORE,
        )  # fmt: skip
        print(f"{args.report / report.PAGE}: the report")
    if args.calibrate and how is not None:
        calibration.store(args.model, how)
        print(f"{Path(args.model, CONFIG)}: temperature {how.temperature:.4f}{_threshold(how)}")
    return figures | {"calibration": how and how.as_dict()}


def _threshold(how: stored.Calibration) -> str:
    if how.unknown is None:
        return ", no threshold: no image is classified correctly"
    return f", unknown below {how.unknown.threshold:.4f} ({how.unknown.score})"


def _facts(
    args: argparse.Namespace, model: nn.Module, images: ImageSet, found: evaluation.Evaluation
) -> dict[str, dict[str, Any]]:
    cfg: dict = getattr(model, "pretrained_cfg", None) or {}
    return {
        "Data": {"data": args.data, "split": args.split, **report.counts(images, found.classes)},
        "Model": {
            "model": args.model, "architecture": cfg.get("architecture"), "heads": found.heads,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "Versions": report.versions(),
    }  # fmt: skip
