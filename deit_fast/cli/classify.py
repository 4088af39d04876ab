"""What `deit-fast classify` does; its options are in parsers/classify.py."""

import argparse
import json
import os
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deit_fast import batch_inference, images, predictions

from . import _data, _models


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.topk < 1:
        raise ValueError(f"--topk: {args.topk}, expected 1 or more")
    if args.workers is None and not args.out:
        args.workers = 0
    device, dtype, batch, workers = _data.setting(args)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold: {args.threshold}, expected 0 to 1, a probability")
    if args.embed and (args.threshold is not None or args.unknown):
        raise ValueError("--embed: features have no classes, expected no --threshold or --unknown")
    if args.embed and not args.out:
        raise ValueError("--embed: expected --out FILE for the features")
    if args.json and args.out:
        raise ValueError("--json: goes to standard output, expected --out FILE.jsonl instead")
    if args.out:
        predictions.check_output(args.out, args.embed, args.overwrite)
    if next(images.find(args.images), None) is None:
        raise ValueError(f"no images found in {', '.join(args.images)}")
    model = _models.load(args).to(device, _models.DTYPES[dtype])
    predictor = batch_inference.Predictor(
        model, batch, args.topk, args.embed, args.threshold, args.unknown
    )
    if not args.out:
        return _print(predictor, args, workers)
    return _write(predictor, args, workers, dtype)


def _print(predictor: batch_inference.Predictor, args: argparse.Namespace, workers: int) -> int:
    labels = batch_inference.label_names(predictor.engine.model)
    count = failed = 0
    for batch in batch_inference.predict(predictor, images.find(args.images), workers):
        for entry in predictions.entries(batch, labels):
            if args.json:
                text = json.dumps(entry, indent=1)
                print(f"{',' if count else '['}\n{text}", end="")
            else:
                _show(entry)
            count += 1
            failed += "error" in entry
    if args.json:
        print("\n]")
    return 1 if failed else 0


def _show(entry: dict) -> None:
    if "error" in entry:
        print(f"{entry['image']}: {entry['error']}", file=sys.stderr)  # which escapes odd bytes
        return
    print(entry["image"].encode(errors="backslashreplace").decode())
    if entry.get("unknown"):
        print("           unknown")
    for p in entry["predictions"]:
        print(f"  {p['score']:7.2%}  {p['label']}")


def _write(
    predictor: batch_inference.Predictor, args: argparse.Namespace, workers: int, dtype: str
) -> int:
    model, console = predictor.engine.model, Console(stderr=True)
    description = {
        "images": args.images,
        "directory": os.getcwd(),
        "out": os.path.basename(args.out),
        "model": args.model,
        "weights": batch_inference.digest(model),
        "dtype": dtype,
        "heads": getattr(model, "heads", None),
        "embed": args.embed,
        "topk": predictor.topk,
        "threshold": predictor.threshold,
        "unknown": predictor.unknown or None,  # as in a job of a version without it
        "calibration": predictor.calibration and predictor.calibration.as_dict(),
        "image_size": list(predictor.engine.image_shape),
    }
    labels = None if args.embed else batch_inference.label_names(model)
    job = predictions.Job(args.out, description, labels, args.embed, args.overwrite, args.restart)
    job.begin(images.find(args.images))
    total, before = job.state["total"], job.state["done"]
    if job.resumed:
        console.print(f"resumed: {before:,} of {total:,} images are done", soft_wrap=True)
    clock = batch_inference.Clock()
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=total, completed=before, rate="")
            for batch in batch_inference.predict(predictor, job.todo(), workers, clock):
                job.write(batch)
                rate = (job.state["done"] - before) / max(clock.total, 1e-9)
                progress.update(bar, completed=job.state["done"], rate=f"{rate:,.1f} images/s")
    except KeyboardInterrupt:
        job.save()
        done = job.state["done"]
        note = f"interrupted after {done:,} of {total:,} images: the same command resumes there"
        console.print(note, soft_wrap=True)
        return 130
    made = job.finish()
    count, failed = job.state["done"] - before, job.state["failed"]
    rate = count / max(clock.total, 1e-9)
    names = ", ".join(map(str, made))
    for line in (
        f"{names}: {total:,} images, {failed:,} of them unreadable",
        f"{count:,} images in {clock.total:.1f} s, {rate:,.1f} images/s ({dtype} on "
        f"{predictor.engine.device})",
        f"waiting for the decoder: {clock.share:.0%} of the time, {workers} workers",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return 0
