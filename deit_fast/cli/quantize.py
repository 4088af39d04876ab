"""Quantize a model to FP8 or INT8, and report how far it is from the original.

Examples:
  deit-fast quantize deit_base --out base-fp8
  deit-fast quantize deit_base --calibration imagenet --data imagenet --out base-fp8
  deit-fast quantize deit_small --format int8 --exclude 'blocks.0.*' --exclude '*.fc2' --json s.json
  deit-fast quantize deit_base_384 --attention --data imagenet
  deit-fast quantize runs/tiny/model --calibration photos/ --images 64 --worst

--data takes labelled images, --calibration those or any folder, list or pattern of images. Without
--data the models are compared on the photographs that come with deit_fast. fp8 without
--calibration has bound-derived activation scales. --worst quantizes each layer alone, then all but
it, and ranks the layers: --exclude the first. --exclude takes the names in the tables. The tables
of layers are without FP8 attention.

Layers are compared on the images, on random inputs, and on random inputs with some channels 50
times the others. The random inputs have the rms of the images'.

Exit code: 0; 1 if images could not be read and were skipped; 2 for an error; 130 for Ctrl-C.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import deit_fast
from deit_fast import quantization_report
from deit_fast.distill import evaluate
from deit_fast.distill.datasets import ImageSet, has_split, open_images
from deit_fast.engine import data_config
from deit_fast.images import Decoder, find
from deit_fast.kernels.quantize import FORMATS

from . import _data, _models

SAMPLE = 16  # images that layers are compared on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "model", metavar="MODEL",
        help="one of ours, any timm ViT or DeiT, or a folder from save_pretrained",
    )  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="fp8", help="(default: fp8)")
    parser.add_argument(
        "--calibration", metavar="DATA", help="images to calibrate fp8 on: their train split"
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="number of calibration images, spread evenly (default: 256)",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN",
        help="layers to skip: blocks.0.attn.qkv, 'blocks.11.*'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--attention", action="store_true", help="attention's two matmuls in fp8 too"
    )
    parser.add_argument("--data", metavar="DATA", help="labelled images, as eval takes them")
    parser.add_argument(
        "--split", choices=("train", "validation"),
        help="the part of --data (default: validation if it has that, else all of it)",
    )  # fmt: skip
    _data.add_keys(parser)
    parser.add_argument("--worst", action="store_true", help="rank the layers by their error")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="save the model there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    _models.add_arguments(parser)
    _data.add_running(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
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
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
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
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
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
    if has_split(path, "train"):
        split = "train"
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
