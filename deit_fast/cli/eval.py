"""What `deit-fast eval` does; its options are in parsers/eval.py."""

import argparse
from collections.abc import Callable
from typing import Any

from deit_fast.distill import evaluate, real

from . import _data, _json, _models


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the figures; returns the exit code."""
    with _json.output(args.json) as write:
        return _run(args, write)


def _run(args: argparse.Namespace, write: Callable[[Any], None]) -> int:
    setting = _data.setting(args)
    labels = None if args.real is None else real.read_real_labels(args.real)
    model = _models.load(args, strict=False)
    images = _data.images_for(model, args)
    evaluate.check(model, images)
    if labels is not None:
        labels = real.real_truths(labels, map(images.name, range(len(images))))
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
    write(result)
    return _data.report_skipped(found.skipped)
