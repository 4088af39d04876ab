"""Top-1 and top-5 of a model over labelled images, of each head of a distilled one.

Examples:
  deit-fast eval imagenet --model deit_small_distilled
  deit-fast eval imagenet --model deit_base_distilled_384 --real real.json
  deit-fast eval imagenetv2-matched-frequency-format-val --model deit_base --dtype fp32
  deit-fast eval cifar10 --model runs/tiny/model --json tiny.json

Labels are compared by number: DATA has to have the model's classes, in sorted order, and all of
them. --real takes the ReaL labels of ImageNet's validation images (Beyer et al., 2020).

Exit code: 0; 1 where images could not be read and were skipped; 2 for an error; 130 for Ctrl-C.
"""

import argparse
import json
from pathlib import Path

from deit_fast.distill import evaluate, real

from . import _data, _models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    _data.add_arguments(parser)
    parser.add_argument(
        "--model", required=True, metavar="NAME",
        help="one of ours, any timm name, or a folder from save_pretrained",
    )  # fmt: skip
    _models.add_arguments(parser, heads=False)  # all of them are shown
    parser.add_argument("--real", type=Path, metavar="FILE", help="also judge by these labels")
    _data.add_running(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the figures; returns the exit code."""
    setting = _data.setting(args)
    labels = None if args.real is None else real.read_real_labels(args.real)
    model = _models.load(args, strict=False)
    images = _data.images_for(model, args)
    evaluate.check(model, images)
    if labels is not None:
        labels = real.real_truths(labels, map(images.name, range(len(images))))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    model.to(setting.device, _models.DTYPES[setting.dtype])
    with _data.progress(len(images)) as progress:
        found = evaluate.predictions(
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
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return _data.report_skipped(found.skipped)
