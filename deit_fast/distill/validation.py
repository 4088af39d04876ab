"""Accuracy and loss on the validation images, each rank evaluating its share."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from . import evaluate
from .datasets import ImageSet
from .distributed import Ranks


def validate(
    model: nn.Module, images: ImageSet, ranks: Ranks, *, batch_size: int, workers: int,
    dtype: torch.dtype | None, progress: Callable[[int], None],
) -> tuple[dict, list[tuple[str, str]]]:  # fmt: skip
    """Evaluate a model, which is left in eval mode; every rank makes this call.

    Args:
        model: On this rank's device.
        images: The validation set.
        ranks: Who shares it.
        batch_size: Images of this rank in a forward pass.
        workers: Processes that decode.
        dtype: Of autocast, or None.
        progress: Told how many images of this rank are done.

    Returns:
        {"top1": {head: percent}, "top5": {head: percent}, "balanced": {head: percent}, "loss":
        mean, "images": how many} of all ranks, and (name, reason) of this rank's unreadable images.
        "balanced" is the mean of the recall over the classes that have an image, "loss" the cross
        entropy of the model's output (`joint` of a distilled one).
    """
    numbers = range(ranks.rank, len(images), ranks.world_size)
    heads = evaluate.heads_of(model)
    accuracy = evaluate.Accuracy(0, dict.fromkeys(heads, 0), dict.fromkeys(heads, 0))
    classes, loss = len(images.classes), 0.0
    labelled = np.zeros(classes, np.int64)  # images of each class
    right = np.zeros((len(heads), classes), np.int64)  # of these, by head
    skipped: list[tuple[str, str]] = []
    if numbers or ranks.world_size == 1:
        found = evaluate.predictions(
            model.eval(), images, batch_size=batch_size, workers=workers, dtype=dtype,
            numbers=numbers, progress=progress,
        )  # fmt: skip
        skipped, accuracy = found.skipped, found.accuracy()
        loss = found.loss * accuracy.images
        labelled = np.bincount(found.labels, minlength=classes)
        for row, best in zip(right, found.top.values(), strict=True):
            row += np.bincount(found.labels[best[:, 0] == found.labels], minlength=classes)
    counts = [accuracy.images, *accuracy.top1.values(), *accuracy.top5.values()]
    sums = ranks.all_reduce(loss, *counts, *labelled.tolist(), *right.flatten().tolist())
    total, top1, top5, labelled, right = np.split(
        np.array(sums[1:]).astype(np.int64), np.cumsum([1, len(heads), len(heads), classes])
    )
    together = evaluate.Accuracy(
        int(total[0]),
        dict(zip(heads, top1.tolist(), strict=True)),
        dict(zip(heads, top5.tolist(), strict=True)),
    )
    there = labelled > 0
    recalls = right.reshape(len(heads), classes)[:, there] / labelled[there]
    means = (100 * recalls.mean(1)).tolist()
    return together.percent() | {
        "balanced": dict(zip(heads, means, strict=True)), "loss": sums[0] / together.images,
        "images": together.images,
    }, skipped  # fmt: skip
