"""Top-1 and top-5 of every head over a set of images.

A distilled model gives four predictions (DeiT paper, section 4 and Table 3): that of each head, and
two fusions. All of them come from one forward pass, and of each only the best five classes are
kept, so that memory does not depend on the number of classes.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from deit_fast.engine import data_config
from deit_fast.images import CHUNK, Decoder, Unreadable, decode
from deit_fast.kernels.classifier import fuse
from deit_fast.kernels.patch_embed import normalize_reference

from .datasets import ImageSet

HEADS = ("class", "distill", "joint", "joint_softmax")
TOP = 5


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Name the keys of `head_logits`: all of `HEADS` for a distilled model, else "class"."""
    return HEADS if isinstance(model, VisionTransformerDistilled) else HEADS[:1]


def head_logits(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Compute every head's logits in one forward pass.

    Args:
        model: timm's or accelerated, in eval mode.
        images: (B, C, H, W), normalised.

    Returns:
        (B, classes) each, in the model's dtype. A distilled model gives "class" and "distill",
        their mean "joint" (timm) and the sum of their softmax outputs "joint_softmax" (paper): each
        what the model returns with those `heads`. Others give "class".
    """
    if not isinstance(model, VisionTransformerDistilled):
        return {"class": model(images)}
    x = model.forward_features(images)
    heads = [model.head(x[:, 0]), model.head_dist(x[:, 1])]
    return dict(zip(HEADS, [*heads, *(fuse(fusion, heads) for fusion in HEADS[2:])], strict=True))


@dataclass
class Accuracy:
    """How often each head was right.

    Attributes:
        images: How many were judged.
        top1: {head: how often the best class was right}.
        top5: {head: how often one of the best five, or as many as there are, was}.
    """

    images: int = 0
    top1: dict[str, int] = field(default_factory=dict)
    top5: dict[str, int] = field(default_factory=dict)

    def add(self, top: dict[str, np.ndarray], truths: Sequence | np.ndarray) -> None:
        """Count a batch.

        Args:
            top: Of each head the classes (B, k) int64, best first.
            truths: The label of each image, or a list of those that are right. An image for which
                none is right is left out.

        Raises:
            ValueError: There are not as many truths as images.
        """
        lists = [t if isinstance(t, list) else [t] for t in truths]
        judged = [i for i, truth in enumerate(lists) if truth]
        self.images += len(judged)
        for head, classes in top.items():
            if len(classes) != len(lists):
                raise ValueError(f"truths: {len(lists)} for {len(classes)} images of head {head}")
            rows = classes.tolist()
            hits = [[c in lists[i] for c in rows[i]] for i in judged]
            self.top1[head] = self.top1.get(head, 0) + sum(hit[0] for hit in hits)
            self.top5[head] = self.top5.get(head, 0) + sum(map(any, hits))

    def percent(self) -> dict[str, dict[str, float]]:
        """Return {"top1": {head: percent}, "top5": {head: percent}}.

        Raises:
            ValueError: No image was judged.
        """
        if not self.images:
            raise ValueError("images: none with a label to judge by")
        counts = {"top1": self.top1, "top5": self.top5}
        return {k: {h: 100 * n / self.images for h, n in v.items()} for k, v in counts.items()}


@dataclass
class Predictions:
    """A model's predictions for the readable ones among some images.

    Attributes:
        numbers: int64 (n,), places in the set of images.
        labels: int64 (n,).
        top: {head: int64 (n, min(5, classes)), best first}.
        skipped: Name of each unreadable image, and why.
        seconds: Decoding included.
        loss: Mean cross entropy of the model's output, for a distilled model `joint`.
    """

    numbers: np.ndarray
    labels: np.ndarray
    top: dict[str, np.ndarray]
    skipped: list[tuple[str, str]]
    seconds: float
    loss: float = math.nan

    def accuracy(self, truths: Sequence | None = None) -> Accuracy:
        """Judge by the labels, or by `truths` (see `Accuracy.add`)."""
        found = Accuracy()
        found.add(self.top, self.labels if truths is None else truths)
        return found


def check(model: nn.Module, images: ImageSet) -> None:
    """Check that a model can be evaluated on these images.

    Raises:
        ValueError: It is in train mode, or the labels can't be its classes.
    """
    if model.training:
        raise ValueError("model: in train mode, expected model.eval()")
    if model.num_classes != len(images.classes):
        raise ValueError(
            f"model: {model.num_classes} classes, images: {len(images.classes)}, expected as many "
            "(a label is a place among the images' classes: some of ImageNet's alone are numbered "
            "anew, so they can't be compared with a model of all)"
        )


class _Pixels:
    """Number of an image -> what the transform makes of it, in the worker processes."""

    def __init__(self, images: ImageSet, transform: Callable):
        self.images, self.transform = images, transform

    def __call__(self, number: int) -> np.ndarray:
        image = self.images.image(number)
        try:
            return np.asarray(self.transform(image))
        except Exception as error:  # an image of an odd shape makes a transform raise anything
            raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error


def batches(
    model: nn.Module, images: ImageSet, batch_size: int, workers: int,
    skipped: list[tuple[str, str]],
    numbers: Iterable[int] | None = None, transform: Callable | None = None,
) -> Iterator[tuple[list[int], Tensor]]:  # fmt: skip
    """Decode and normalise images for a model.

    Args:
        model: Whose device, dtype and data configuration are taken.
        images: As gray or colour as the model expects them.
        batch_size: How many readable images a batch has at most.
        workers: Processes that decode; 0: this one.
        skipped: Unreadable images are added here, with the reason.
        numbers: The images to take; None: all.
        transform: As for `predictions`.

    Yields:
        Numbers of readable images, and their pixels (B, C, H, W), normalised, on the model's device
        in its dtype.

    Raises:
        ValueError: An option does not fit.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name}: {value}, expected {least} or more")
    config, like = data_config(model), next(model.parameters())
    decoder = Decoder(config)
    if images.mode != decoder.mode:
        raise ValueError(f"images: mode {images.mode}, expected {decoder.mode} for this model")
    mean, std = config["mean"], config["std"]
    if {len(mean), len(std)} != {len(images.mode)}:  # "L" is one channel, "RGB" three
        raise ValueError(
            f"model: mean {mean}, std {std} in its pretrained_cfg, expected one a channel"
        )
    # timm's transform up to the bytes, a quarter of the floats, which are normalised on the device
    source = _Pixels(images, transform or decoder.transform)

    def batch() -> tuple[list[int], Tensor]:
        x = torch.from_numpy(np.concatenate(pixels)).to(like.device)
        if x.dtype == torch.uint8:
            x = normalize_reference(x.permute(0, 2, 3, 1), mean, std)
        return readable, x.to(like.dtype)

    wanted: Iterable = range(len(images)) if numbers is None else numbers
    found = decode(wanted, source, workers, min(CHUNK, batch_size))
    decodings = cast(Iterator[tuple[list[int], list[str | None], np.ndarray]], found)
    readable: list[int] = []
    pixels: list[np.ndarray] = []
    for some, reasons, decoded in decodings:
        if readable and len(readable) + len(decoded) > batch_size:
            yield batch()
            readable, pixels = [], []
        skipped += [(images.name(i), why) for i, why in zip(some, reasons, strict=True) if why]
        readable += [i for i, why in zip(some, reasons, strict=True) if why is None]
        pixels += [decoded] if len(decoded) else []
    if readable:
        yield batch()


def predictions(
    model: nn.Module, images: ImageSet, *, batch_size: int = 64, workers: int = 0,
    device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    transform: Callable | None = None, progress: Callable[[int], None] | None = None,
    numbers: Iterable[int] | None = None,
) -> Predictions:  # fmt: skip
    """Run a model over a set of images; what can't be read is skipped and named.

    Args:
        model: In eval mode.
        images: What it is run over.
        batch_size: Images in a forward pass.
        workers: Processes that decode; 0: this one.
        device: Where the model is moved to; None: it stays.
        dtype: fp16 or bf16, by autocast; None: the model's.
        transform: Of a PIL image, to float (C, H, W), normalised, or uint8 (C, H, W), not yet.
            None: timm's for evaluation.
        progress: Told how many images are done.
        numbers: The images to take; None: all.

    Raises:
        ValueError: As for `check`, for options that do not fit, and where no image can be read.
        FloatingPointError: A logit is NaN.
    """
    check(model, images)
    if device is not None:
        model.to(device)
    like = next(model.parameters())
    skipped: list[tuple[str, str]] = []
    read: list[int] = []
    top: dict[str, list[np.ndarray]] = {head: [] for head in heads_of(model)}
    losses = 0.0
    began = time.perf_counter()
    amp = None if dtype == like.dtype else dtype
    for some, x in batches(model, images, batch_size, workers, skipped, numbers, transform):
        with torch.inference_mode(), torch.autocast(x.device.type, amp, enabled=amp is not None):
            logits = head_logits(model, x)
        for head, values in logits.items():
            if values.isnan().any():
                raise FloatingPointError(
                    f"model: NaN from head {head} in a batch of {len(some)} images"
                )
            best = values.float().topk(min(TOP, values.shape[1])).indices
            top[head].append(best.cpu().numpy())
        output = logits.get("joint", logits["class"]).double()
        truths = torch.from_numpy(np.asarray(images.labels)[some]).to(output.device)
        losses += F.cross_entropy(output, truths, reduction="sum").item()
        read += some
        if progress is not None:
            progress(len(read) + len(skipped))
    seconds = time.perf_counter() - began
    if not read:
        why = f" ({': '.join(skipped[0])})" if skipped else ""
        raise ValueError(f"images: none of {len(images)} could be read{why}")
    places = np.array(read, np.int64)
    found = {head: np.concatenate(parts) for head, parts in top.items()}
    labels = np.asarray(images.labels)[places]
    return Predictions(places, labels, found, skipped, seconds, losses / len(read))
