"""Class names for pictures, from a DeiT or any other timm model that can be accelerated.

examples:
  deit-fast classify cat.jpg dog.png
  deit-fast classify --model deit_base_distilled_384 --topk 3 --json *.jpg
  deit-fast classify --checkpoint deit_base_distilled.safetensors --heads distill cat.jpg

Weights are timm's from the Hugging Face hub unless --checkpoint names a file. Files that are no
readable picture are reported, the rest is classified all the same, and the exit code is then 1.
"""

import argparse
import json
import sys
from pathlib import Path

import timm.data
import torch
from PIL import Image

import deit_fast
from deit_fast.kernels.classifier import FUSIONS

BATCH = 32


def add_arguments(parser):
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    parser.add_argument(
        "--model", default="deit_small_distilled", metavar="NAME",
        help="one of ours or any timm name (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="official .pth or .safetensors"
    )
    parser.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction,
        help="weights from the hub (default without --checkpoint); --no-pretrained: random ones",
    )  # fmt: skip
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="(default: %(default)s)")
    parser.add_argument(
        "--heads",
        choices=FUSIONS,
        default="joint",
        help="of a distilled model (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")


def run(args) -> int:
    if args.topk < 1:
        raise ValueError(f"--topk: {args.topk}, want 1 or more")
    model = _model(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    label = _labels(model.num_classes)

    results = []
    for start in range(0, len(args.images), BATCH):
        entries, tensors = [], []
        for path in args.images[start : start + BATCH]:
            entries.append({"image": str(path)})
            try:
                with Image.open(path) as image:
                    tensors.append(transform(image.convert("RGB")))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                entries[-1]["error"] = _reason(path, error)
        readable = [entry for entry in entries if "error" not in entry]
        if readable:
            scores = _scores(model, torch.stack(tensors).to(device), args.heads)
            top = scores.topk(min(args.topk, scores.shape[1]))
            for entry, values, indices in zip(readable, *top, strict=True):
                entry["predictions"] = [
                    {"class": i, "label": label(i), "score": round(v, 6)}
                    for v, i in zip(values.tolist(), indices.tolist(), strict=True)
                ]
        results += entries
        if not args.json:
            _print(entries)
    if args.json:
        print(json.dumps(results, indent=1))
    return 1 if any("error" in entry for entry in results) else 0


def _model(args):
    pretrained = args.checkpoint is None if args.pretrained is None else args.pretrained
    options = {"checkpoint": args.checkpoint, "heads": args.heads}
    if not pretrained:
        if args.checkpoint is None:
            print("deit-fast classify: random weights, the labels mean nothing", file=sys.stderr)
            torch.manual_seed(0)
        return deit_fast.create_model(args.model, **options)
    if args.checkpoint is not None:
        raise ValueError("--pretrained and --checkpoint: want one of them, got both")
    try:
        return deit_fast.create_model(args.model, pretrained=True, **options)
    except (OSError, RuntimeError) as error:  # no network, no such repository, unknown name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"no pretrained weights for {args.model} ({reason}); "
            "--checkpoint PATH takes a local file"
        ) from error


def _scores(model, images, heads):
    with torch.inference_mode():
        output = model(images).float()
    return output / 2 if heads == "joint_softmax" else output.softmax(-1)


def _labels(classes):
    if classes != 1000:
        return lambda index: f"class {index}"
    return timm.data.ImageNetInfo().index_to_description


def _reason(path, error):
    if not path.exists():
        return "no such file"
    return str(error).replace(str(path.resolve()), path.name) or type(error).__name__


def _print(entries):
    for entry in entries:
        if "error" in entry:
            print(f"{entry['image']}: {entry['error']}", file=sys.stderr)
            continue
        print(entry["image"])
        for p in entry["predictions"]:
            print(f"  {p['score']:7.2%}  {p['label']}")
