"""Top-1 and top-5 on the validation images, each rank evaluating its share."""

from collections.abc import Callable

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
        {"top1": {head: percent}, "top5": {head: percent}, "images": how many} of all ranks, and
        (name, reason) of this rank's unreadable images.
    """
    numbers = range(ranks.rank, len(images), ranks.world_size)
    heads = evaluate.heads_of(model)
    accuracy = evaluate.Accuracy(0, dict.fromkeys(heads, 0), dict.fromkeys(heads, 0))
    skipped: list[tuple[str, str]] = []
    if numbers or ranks.world_size == 1:
        found = evaluate.predictions(
            model.eval(), images, batch_size=batch_size, workers=workers, dtype=dtype,
            numbers=numbers, progress=progress,
        )  # fmt: skip
        skipped, accuracy = found.skipped, found.accuracy()
    counts = [accuracy.images, *accuracy.top1.values(), *accuracy.top5.values()]
    total, *hits = map(int, ranks.all_reduce(*counts))
    top1, top5 = hits[: len(heads)], hits[len(heads) :]
    together = evaluate.Accuracy(
        total, dict(zip(heads, top1, strict=True)), dict(zip(heads, top5, strict=True))
    )
    return together.percent() | {"images": total}, skipped
