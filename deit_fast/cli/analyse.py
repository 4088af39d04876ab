r"""Which classifiers disagree, what a model looks at, how alike its two tokens are, tables of runs.

Examples:
  deit-fast analyse disagreement imagenet --out table4 \
      --models regnety_160.deit_in1k deit_base deit_base_distilled
  deit-fast analyse disagreement cifar10 --models runs/a/model:class runs/b/model
  deit-fast analyse tokens imagenet --model deit_base_distilled --out tokens
  deit-fast analyse attention cat.jpg dog.jpg --out maps.png
  deit-fast analyse attention photos/ --model deit_base_distilled_384 --rollout --out rollout.png
  deit-fast analyse table runs/* --out results.md

disagreement: the rate of images for which two classifiers predict different classes, the labels
first (DeiT paper, Table 4). NAME:head takes one head of a distilled model, NAME all three.
tokens: mean cosine of class and distillation token at the input, after each block and after the
norm. attention: how much class and distillation token attend to each patch, drawn over the images,
of one block (the mean of its heads) or of all (rollout). table: a row for runs that differ only in
their seed, mean and standard deviation.

Exit code: 0; 1 where images could not be read and were skipped; 2 for an error; 130 for Ctrl-C.
"""

import argparse
import csv
import json
import os
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from deit_fast import attention_weights
from deit_fast.distill import analyse, evaluate
from deit_fast.engine import data_config
from deit_fast.images import Decoder, Unreadable, find

from . import _data, _models

MOST = 64  # images, a row each: a figure that is higher can't be looked at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the analyses and their options."""
    kinds = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")

    pairs = kinds.add_parser("disagreement", help="disagreement rate of classifiers")
    _data.add_arguments(pairs)
    pairs.add_argument(
        "--models", required=True, nargs="+", metavar="NAME[:HEAD]",
        help=f"a name or folder, and perhaps one of its heads: {', '.join(evaluate.HEADS)}",
    )  # fmt: skip
    pairs.set_defaults(**dict.fromkeys(("checkpoint", "checkpoint_key", "pretrained", "heads")))
    pairs.set_defaults(img_size=None)
    _data.add_running(pairs)

    tokens = kinds.add_parser("tokens", help="how alike class and distillation token are")
    _data.add_arguments(tokens)
    tokens.add_argument("--model", required=True, metavar="NAME", help="distilled, or a folder")
    _models.add_arguments(tokens, heads=False)
    tokens.add_argument(
        "--count", type=int, default=1000, metavar="N",
        help="images, spread over DATA (default: %(default)s)",
    )  # fmt: skip
    _data.add_running(tokens)
    for one in (pairs, tokens):
        one.add_argument("--out", type=Path, metavar="DIR", help="also write files and a plot")

    maps = kinds.add_parser("attention", help="what a model's tokens attend to, as a figure")
    maps.add_argument(
        "images", nargs="+", metavar="IMAGE", help=f"as classify takes them, at most {MOST}"
    )
    maps.add_argument(
        "--model", default="deit_small_distilled", metavar="NAME",
        help="a ViT, DeiT or CaiT, or a folder from save_pretrained (default: %(default)s)",
    )  # fmt: skip
    _models.add_arguments(maps, heads=False)
    maps.add_argument("--block", type=int, metavar="I", help="from 0, or -1 for the last (default)")
    maps.add_argument("--rollout", action="store_true", help="through all blocks instead")
    maps.add_argument("--out", type=Path, required=True, metavar="PNG", help="the figure")

    table = kinds.add_parser("table", help="a table of training runs")
    table.add_argument("runs", nargs="+", metavar="RUN", help="folder with run.json, result.json")
    table.add_argument("--out", type=Path, metavar="FILE", help="write Markdown, print nothing")


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
    return {"disagreement": _disagreement, "tokens": _tokens}[args.analysis](args, setting, plots)


def _import_plots() -> ModuleType:
    """Import what needs matplotlib, which may be missing: said before anything runs."""
    from deit_fast.distill import plots

    return plots


def _disagreement(
    args: argparse.Namespace, setting: _data.Setting, plots: ModuleType | None
) -> int:
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
    if plots is not None:
        lines = [(name, *row) for name, row in zip(names, rates.tolist(), strict=True)]
        _write_csv(args.out / "disagreement.csv", ("", *names), lines)
        result = {
            "data": args.data, "split": args.split, "images": count, "classifiers": names,
            "disagreement": rates.tolist(), "skipped": [list(pair) for pair in skipped.items()],
        }  # fmt: skip
        text = json.dumps(result, indent=1) + "\n"
        (args.out / "disagreement.json").write_text(text, encoding="utf-8")
        plots.matrix(names, rates, title, args.out / "disagreement.png")
    return _data.report_skipped(list(skipped.items()))


def _tokens(args: argparse.Namespace, setting: _data.Setting, plots: ModuleType | None) -> int:
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
        _write_csv(args.out / "tokens.csv", ("after", "cosine"), found.cosines.items())
        plots.line(found.cosines, title, "mean cosine", args.out / "tokens.png")
    return _data.report_skipped(found.skipped)


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
        args.out.write_text(analyse.markdown(rows), encoding="utf-8")
    return 0


def _write_csv(path: Path, header: tuple, rows: Iterable[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
