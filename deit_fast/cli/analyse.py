"""What `deit-fast analyse` does; its options are in parsers/analyse.py."""

import argparse
import os
import tempfile
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from deit_fast import attention_weights
from deit_fast.distill import analyse, checkpoints, evaluate, run_folder
from deit_fast.engine import data_config
from deit_fast.images import Decoder, Unreadable, find

from . import _data, _json, _models
from .parsers.analyse import MOST


def run(args: argparse.Namespace) -> int:
    """Run the analysis; returns the exit code."""
    if args.analysis == "table":
        return _table(args)
    if args.analysis == "attention":
        return _attention(args)
    setting = _data.setting(args)
    plots = None if args.out is None else _import_plots()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    analysis = {"disagreement": _disagreement, "tokens": _tokens}[args.analysis]
    with _json.output(args.json) as write:
        found = analysis(args, setting, plots)
        write(found)
        return _data.report_skipped(found["skipped"])


def _import_plots() -> ModuleType:
    """Import what needs matplotlib, which may be missing: said before anything runs."""
    from deit_fast.distill import plots

    return plots


def _disagreement(
    args: argparse.Namespace, setting: _data.Setting, plots: ModuleType | None
) -> dict[str, Any]:
    wanted = analyse.parse_classifiers(args.models)
    models = {
        name: _models.load(argparse.Namespace(**vars(args) | {"model": name}), strict=False)
        for name in wanted
    }
    runs, todo = [], []
    skipped: dict[str, str] = {}
    for name, model in models.items():  # all that can be wrong, before the first is run
        images = _data.images_for(model, args)
        evaluate.check(model, images)
        todo.append((analyse.rows_of(name, model, wanted[name]), name, images))
    for rows, name, images in todo:
        model = models.pop(name).to(setting.device, _models.DTYPES[setting.dtype])
        with _data.progress(len(images), name) as progress:
            found = evaluate.predictions(
                model, images, batch_size=setting.batch, workers=setting.workers, progress=progress
            )
        runs.append((rows, found))
        skipped |= dict(found.skipped)
    predicted = analyse.predicted_classes(runs)
    rates, names = analyse.disagreement(predicted), list(predicted)
    count = len(predicted[analyse.TRUTH])
    title = f"disagreement rate over {count:,} images"
    numbers = [str(i) for i in range(len(names))]  # names would make wide columns
    cells = [
        (number, name, *(f"{rate:.3f}" for rate in row))
        for number, name, row in zip(numbers, names, rates, strict=True)
    ]
    _data.show(title, ("", "classifier"), tuple(numbers), cells)
    result = {
        "data": args.data, "split": args.split, "images": count, "classifiers": names,
        "disagreement": rates.tolist(), "skipped": [list(pair) for pair in skipped.items()],
    }  # fmt: skip
    if plots is not None:
        lines = [
            {"": name} | dict(zip(names, row, strict=True))
            for name, row in zip(names, rates.tolist(), strict=True)
        ]
        run_folder.write_csv(args.out / "disagreement.csv", lines)
        run_folder.write_json(args.out / "disagreement.json", result)
        plots.matrix(names, rates, title, args.out / "disagreement.png")
    return result


def _tokens(
    args: argparse.Namespace, setting: _data.Setting, plots: ModuleType | None
) -> dict[str, Any]:
    model = _models.load(args, strict=False)
    images = _data.images_for(model, args)
    model.to(setting.device, _models.DTYPES[setting.dtype])
    found = analyse.token_similarity(
        model, images, count=args.count, batch_size=setting.batch, workers=setting.workers
    )
    title = f"{args.model}: cosine of class and distillation token, {found.images:,} images"
    cells = [(place, f"{cosine:.4f}") for place, cosine in found.cosines.items()]
    _data.show(title, ("after",), ("cosine",), cells)
    if plots is not None:
        lines = [{"after": place, "cosine": cosine} for place, cosine in found.cosines.items()]
        run_folder.write_csv(args.out / "tokens.csv", lines)
        plots.line(found.cosines, title, "mean cosine", args.out / "tokens.png")
    return {
        "data": args.data, "split": args.split, "model": args.model, "images": found.images,
        "cosines": found.cosines, "skipped": [list(pair) for pair in found.skipped],
    }  # fmt: skip


def _attention(args: argparse.Namespace) -> int:
    if args.rollout and args.block is not None:
        raise ValueError("--block: rollout goes through all of them, expected one of the two")
    if args.out.suffix != ".png":
        raise ValueError(f"--out: {args.out}, expected a name that ends in .png")
    if args.out.is_dir():
        raise IsADirectoryError(f"--out: {args.out} is a folder")
    plots = _import_plots()
    paths = list(islice(find(args.images), MOST + 1))
    if not paths or len(paths) > MOST:
        wrong = f"more than {MOST} images" if paths else "no images found"
        raise ValueError(f"{wrong} in {', '.join(args.images)}")
    if args.out.resolve() in {Path(path).resolve() for path in paths}:
        raise ValueError(f"--out: {args.out} is an IMAGE, which would be lost")
    model = _models.load(args, strict=False).to("cuda" if torch.cuda.is_available() else "cpu")
    decoder, rows, skipped = Decoder(data_config(model)), [], []
    for path in paths:
        try:
            pixels = decoder(path)
        except Unreadable as error:
            skipped.append((path, str(error)))
            continue
        what, maps = _token_maps(model, torch.from_numpy(pixels)[None], args)
        rows.append((path, pixels, maps))
    if not rows:
        raise ValueError(f"none of {len(paths)} images could be read ({': '.join(skipped[0])})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".attention-") as folder:
        # beside the figure: the last step is a rename, and whatever fails leaves nothing
        plots.attention(rows, f"{args.model}: {what}", Path(folder, "maps.png"))
        os.replace(Path(folder, "maps.png"), args.out)
    print(f"{args.out}: {what}, {len(rows)} images")
    return _data.report_skipped(skipped)


def _token_maps(
    model: nn.Module, image: torch.Tensor, args: argparse.Namespace
) -> tuple[str, dict[str, np.ndarray]]:
    """What is shown, and {token: (h, w)} of one image."""
    if args.rollout:
        what, weights = "attention rollout", attention_weights.attention_rollout(model, image)
    else:
        number = -1 if args.block is None else args.block
        ((name, weights),) = attention_weights.attention_maps(model, image, number).items()
        what, weights = f"attention in {name}, mean of the heads", weights.mean(1)
    maps = attention_weights.token_maps(model, image, weights)
    return what, {token: values[0].cpu().numpy() for token, values in maps.items()}


def _table(args: argparse.Namespace) -> int:
    rows = analyse.comparison(args.runs)
    if args.out is None:
        title = "top-1 and top-5 in %, mean ± standard deviation over seeds"
        _data.show(title, analyse.COLUMNS[:4], analyse.COLUMNS[4:], rows)
    else:
        text = analyse.markdown(rows).encode()
        checkpoints.write_atomically(args.out, lambda file: file.write(text))
    return 0
