"""What `deit-fast quantize` does; its options are in parsers/quantize.py."""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import deit_fast
from deit_fast import quantization_report
from deit_fast.distill import evaluate
from deit_fast.distill.datasets import ImageSet, has_split, open_images
from deit_fast.engine import data_config
from deit_fast.images import Decoder, find

from . import _data, _json, _models

SAMPLE = 16  # images that layers are compared on


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    with _json.output(args.json) as write:
        return _run(args, write)


def _run(args: argparse.Namespace, write: Callable[[Any], None]) -> int:
    setting = _data.setting(args)
    _check(args)
    model = _models.load(args).to(setting.device)
    reference = copy.deepcopy(model)
    images: ImageSet
    if args.data is None:
        images = _Files([str(path) for path in _data.photographs()], model)
    else:
        images = _data.images_for(model, args)
        evaluate.check(model, images)
    skipped: list[tuple[str, str]] = []

    def read(images: ImageSet, count: int | None = None) -> Iterator[tuple[list[int], Tensor]]:
        count = len(images) if count is None else min(count, len(images))
        numbers = [i * len(images) // count for i in range(count)]
        return evaluate.batches(reference, images, setting.batch, setting.workers, skipped, numbers)

    calibration = None
    if args.calibration is not None:
        count = 256 if args.images is None else args.images
        calibration = [x for _, x in read(_calibration_images(model, args), count)]
    # quantized from fp32 weights, whatever dtype the model is to compute in
    report = deit_fast.quantize(
        model, args.format, calibration, args.exclude, attention=args.attention
    )
    print(report)
    if args.out is not None:
        deit_fast.save_pretrained(model, args.out)
    model.to(dtype=_models.DTYPES[setting.dtype])

    def batches(progress: Callable[[int], None]) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        done = 0
        for numbers, x in read(images):
            labels = torch.from_numpy(images.labels[numbers])
            yield x if args.data is None else (x, labels)
            done += len(x)
            progress(done)

    with _data.progress(len(images), args.format) as progress:
        comparison = quantization_report.compare(reference, model, batches(progress))
    sample = torch.cat([x for _, x in read(images, SAMPLE)])
    layers = quantization_report.layer_errors(reference, model, sample)
    result = {
        "model": args.model, "data": args.data, **asdict(report), "dtype": setting.dtype,
        "device": setting.device, "comparison": asdict(comparison),
        "layers": [asdict(layer) for layer in layers],
    }  # fmt: skip
    _show(args, comparison, layers, len(sample))
    if args.worst:
        with _data.progress(1 + 2 * len(layers), "worst layers") as progress:
            shares = quantization_report.worst_layers(
                reference, args.format, sample, calibration, args.exclude, setting.batch,
                progress=lambda done, _: progress(done),
            )  # fmt: skip
        result["worst"] = asdict(shares)
        title = (
            f"relative error of the logits in fp32, {len(sample)} images: {shares.together:.5f} "
            "with all layers"
        )
        rows = [(s.name, f"{s.alone:.5f}", f"{s.without:.5f}") for s in shares.layers]
        _data.show(title, ("layer",), ("it alone", "all but it"), rows)
    if args.out is not None:
        print(f"{args.out}: for from_pretrained and as MODEL of the other commands")
    write(result)
    return _data.report_skipped(list(dict(skipped).items()))


def _check(args: argparse.Namespace) -> None:
    """Check what can be checked before a model is loaded."""
    if args.calibration is not None and args.format != "fp8":
        what = "has dynamic activation scales, expected no --calibration"
        raise ValueError(f"--calibration: {args.format} {what}")
    if args.attention and args.format != "fp8":
        raise ValueError(f"--attention: there is no {args.format} attention, expected --format fp8")
    if args.images is not None and args.calibration is None:
        raise ValueError("--images: of what, expected --calibration DATA too")
    if args.images is not None and args.images < 1:
        raise ValueError(f"--images: {args.images}, expected 1 or more")
    if args.split is not None and args.data is None:
        raise ValueError("--split: of what, expected --data DATA too")
    if args.out is not None and args.out.resolve() == Path(args.model).resolve():
        raise ValueError(f"--out: {args.out} is MODEL, whose weights would be lost")


class _Files(ImageSet):
    """Images without labels."""

    def __init__(self, paths: Sequence[str], model: nn.Module):
        mode = Decoder(data_config(model)).mode
        super().__init__([], np.zeros(len(paths), np.int64), mode)
        self.paths = paths

    def name(self, i: int) -> str:
        """Return the path of image i."""
        return self.paths[i]

    def _file(self, i: int) -> str:
        return self.paths[i]


def _calibration_images(model: nn.Module, args: argparse.Namespace) -> ImageSet:
    """Open the training split of a data set; else all images, labelled or not."""
    path, split = args.calibration, None
    if has_split(path, "train", image_key=args.image_key, label_key=args.label_key):
        split = "train"
    elif Path(path).suffix.lower() == ".csv":
        pass  # a table, and no image of that name
    elif paths := list(find([path])):
        return _Files(paths, model)
    return open_images(
        path, split, mode=Decoder(data_config(model)).mode, image_key=args.image_key,
        label_key=args.label_key,
    )  # fmt: skip


def _show(
    args: argparse.Namespace,
    comparison: quantization_report.Comparison,
    layers: list[quantization_report.LayerErrors],
    sample: int,
) -> None:
    what = args.data or "the photographs of deit_fast"
    title = f"{args.model} in {args.format} against fp32, {comparison.images:,} images of {what}"
    cells = {
        "error of the logits": f"{comparison.logits_error:.5f}",
        "agreement, %": f"{comparison.agreement:.2f}",
    }
    if comparison.top1 is not None:
        cells["top-1 in fp32, %"] = f"{comparison.top1:.2f}"
        cells[f"in {args.format}, %"] = f"{comparison.top1_quantized:.2f}"
    _data.show(title, (), tuple(cells), [tuple(cells.values())])
    rows = [(e.name, *(f"{v:.4f}" for v in (e.images, e.random, e.outliers))) for e in layers]
    title = f"relative error of each layer alone, inputs of {sample} images and random ones"
    _data.show(title, ("layer",), ("images", "random", "outliers"), rows)
