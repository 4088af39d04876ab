"""What `deit-fast demo` does; its options are in parsers/demo.py."""

import argparse
import copy
import time
from pathlib import Path
from statistics import median

import numpy as np
import timm
import timm.data
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

import deit_fast
from deit_fast.batch_inference import label_names
from deit_fast.engine import data_config
from deit_fast.images import Decoder
from deit_fast.kernels import _policy

from . import _data

MODELS = ("deit_tiny_distilled", "deit_small_distilled")
RUNS = 10


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 in both columns
    batch = (256 if cuda else 8) if args.batch is None else args.batch
    if batch < 1:
        raise ValueError(f"--batch: {batch}, expected 1 or more")
    console = Console()
    photos = _data.photographs()
    names = ", ".join(p.stem for p in photos)
    console.print(f"photographs: {names} (credits: deit_fast/data/CREDITS.md)")
    weights = (
        "timm's pretrained" if args.pretrained else "random (seed 0): the classes mean nothing"
    )
    console.print(f"weights: {weights}")

    # narrow enough for 80 columns, so that no number is cut
    table = Table(title="the same weights twice", box=SIMPLE_HEAD, show_edge=False)
    table.collapse_padding = True
    table.add_column("model", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for heading in (
        "top-5\nagreement", "relative\nerror", "timm\nimages/s", "deit_fast\nimages/s", "ratio",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    agree = True
    for name in MODELS:
        torch.manual_seed(0)
        reference = timm.create_model(deit_fast.NAMES[name], pretrained=args.pretrained).eval()
        fast = copy.deepcopy(reference)
        report = deit_fast.accelerate(fast)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(reference))
        images = torch.stack([transform(Image.open(p).convert("RGB")) for p in photos])
        for dtype in (torch.float32, torch.float16) if cuda else (torch.float32,):
            models = [m.to(device, dtype) for m in (reference, fast)]
            agreement, error = _compare(models[0], models[1], images.to(device, dtype))
            x = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch].to(device, dtype)
            timm_rate, rate = _images_per_second(models, x)
            table.add_row(
                name, {torch.float32: "fp32", torch.float16: "fp16"}[dtype],
                f"{agreement:.0%}", f"{error:.1e}",
                f"{timm_rate:,.0f}", f"{rate:,.0f}", f"{rate / timm_rate:.2f}",
            )  # fmt: skip
            agree &= dtype != torch.float32 or (agreement == 1 and error < 1e-5)
        if args.pretrained:
            _print_labels(console, fast.float(), images.to(device), photos)
    console.print(table)
    console.print(
        f"batch {batch}, median of {RUNS} runs, alternating; images already on the device"
    )
    console.print(f"backend: {report.backend} ({report.why_backend})")
    capability = torch.cuda.get_device_capability() if cuda else None
    for op in (*_policy.ROW_OPS[:1], *_policy.MATMUL_OPS):
        choice = _policy.choose(op, capability, torch.float16)
        console.print(f"  {op}: {choice.implementation} ({choice.reason})")
    if cuda:
        console.print(f"device: {torch.cuda.get_device_name()}")
    else:
        console.print("device: CPU. These numbers are a CPU's: no Triton kernel ran.")
    correct, total = _classify_fashion(console)
    if not agree:
        console.print("deit_fast disagrees with timm: please report this", style="bold red")
    return 0 if agree and correct == total else 1


def _classify_fashion(console: Console) -> tuple[int, int]:
    """Classify test images of Fashion-MNIST, one of each class, with a model trained on it.

    Returns the number of correct predictions, and of images.
    """
    model = deit_fast.deit_nano_fashion(pretrained=True).eval()
    decoder, labels = Decoder(data_config(model)), label_names(model)
    paths = sorted((_data.SHIPPED / "fashion").iterdir())
    images = torch.from_numpy(np.stack([decoder(path) for path in paths]))
    with torch.inference_mode():
        scores, classes = model(images).softmax(-1).max(1)
    found = [labels[c] for c in classes.tolist()]
    correct = sum(
        _plain(label) == _plain(path.stem) for label, path in zip(found, paths, strict=True)
    )
    console.print(f"deit_nano_fashion, with weights: {correct} of {len(paths)} images correct")
    for path, label, score in zip(paths, found, scores.tolist(), strict=True):
        console.print(f"  {path.stem}: {label} ({score:.0%})")
    return correct, len(paths)


def _plain(label: str) -> str:
    return label.lower().replace(" ", "-").removesuffix("/top")


def _compare(reference: nn.Module, fast: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """Return the share of images with the same ordered top 5, and the logits' relative error."""
    with torch.inference_mode():
        expected, got = reference(images).double(), fast(images).double()
    same = (expected.topk(5).indices == got.topk(5).indices).all(1).double().mean().item()
    return same, ((got - expected).norm() / expected.norm()).item()


def _images_per_second(models: list[nn.Module], images: torch.Tensor) -> list[float]:
    """Time the models in alternating runs; returns the median of each, after two warm-up runs."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(RUNS + 2):
            for model, seconds in zip(models, times, strict=True):
                _synchronize(images)
                start = time.perf_counter()
                model(images)
                _synchronize(images)
                if turn >= 2:
                    seconds.append(time.perf_counter() - start)
    return [len(images) / median(seconds) for seconds in times]


def _synchronize(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def _print_labels(
    console: Console, model: nn.Module, images: torch.Tensor, photos: list[Path]
) -> None:
    with torch.inference_mode():
        best = model(images).softmax(-1).max(1)
    describe = timm.data.ImageNetInfo().index_to_description
    for photo, score, index in zip(photos, *(t.tolist() for t in best), strict=True):
        console.print(f"  {photo.stem}: {describe(index)} ({score:.0%})")
