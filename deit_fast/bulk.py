"""Images on disk -> classes or features, however many: decoders in worker processes feed an engine.

`Predictor` is the part that does not depend on where images come from or answers go; the command
`deit-fast classify`, `deit_fast.integrations.ray` and the examples share it.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import timm.data
import torch
from torch import nn

from . import images
from .engine import InferenceEngine, data_config


class Predictor:
    """`predictor(uint8 (n, H, W, C)) -> {column: numpy array of n rows}`.

    Columns: "classes" (n, topk) int64 and "scores" (n, topk) fp32 probabilities, best first; or
    with embed "embedding" (n, D) fp32, what the heads work on (timm's pre_logits).

    model: in eval mode, on the device that is to compute. batch_size: images in one pass. Raises
    as `InferenceEngine` does, and ValueError for topk below 1. `decoder` decodes for it.
    """

    def __init__(self, model: nn.Module, batch_size: int, topk: int = 5, embed: bool = False):
        if topk < 1:
            raise ValueError(f"topk: {topk}, expected 1 or more")
        self.embed, self.topk = embed, min(topk, model.num_classes) or topk
        if not embed and not model.num_classes:
            raise ValueError("model: has no classes, expected embed=True")
        self.sums_to_two = getattr(model, "heads", None) == "joint_softmax"
        self.decoder = images.Decoder(data_config(model))
        self.engine = InferenceEngine(
            model, batch_size, output="features" if embed else "logits", prepare=("uint8",)
        )

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        output = self.engine(torch.from_numpy(pixels)).float()
        if self.embed:
            return {"embedding": output.cpu().numpy()}
        probabilities = output / 2 if self.sums_to_two else output.softmax(-1)
        scores, classes = probabilities.topk(self.topk)
        return {"classes": classes.cpu().numpy(), "scores": scores.cpu().numpy()}


def label_names(model: nn.Module) -> list[str]:
    """Of its classes: those its configuration gives, ImageNet's for 1000, else their numbers."""
    given = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if given and len(given) == model.num_classes:
        return list(given)
    if model.num_classes == 1000:
        label = timm.data.ImageNetInfo().index_to_description
        return [label(i) for i in range(1000)]
    return [f"class {i}" for i in range(model.num_classes)]


def digest(model: nn.Module) -> str:
    """Of the weights, their names and their dtype: a resumed run has to have the same."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@dataclass
class Batch:
    """What became of some images, in their order. `columns` has a row for each readable one."""

    paths: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)  # why unreadable; None: it is readable
    columns: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Clock:
    """Seconds a run took, and those of them in which nothing was decoded yet to compute with."""

    total: float = 0.0
    waiting: float = 0.0

    @property
    def share(self) -> float:
        return self.waiting / self.total if self.total else 0.0


def predict(
    predictor: Predictor, paths: Iterable[str], workers: int, clock: Clock | None = None
) -> Iterator[Batch]:
    """Decode `paths` in `workers` processes and predict; batches come in the order of `paths`.

    Memory holds a few chunks of decoded images a worker and one batch, whatever the number of
    paths.
    """
    clock = Clock() if clock is None else clock
    size = predictor.engine.batch_sizes[-1]
    chunk = min(images.CHUNK, size)
    began = time.perf_counter()
    batch, pixels = Batch(), []
    for paths_of, reasons, decoded in _timed(
        images.decode(paths, predictor.decoder, workers, chunk), clock
    ):
        if len(batch.paths) + len(paths_of) > size:
            yield _finish(predictor, batch, pixels)
            batch, pixels = Batch(), []
        batch.paths += paths_of
        batch.reasons += reasons
        if len(decoded):
            pixels.append(decoded)
        clock.total = time.perf_counter() - began
    if batch.paths:
        yield _finish(predictor, batch, pixels)
    clock.total = time.perf_counter() - began


def _finish(predictor, batch, pixels):
    if pixels:
        batch.columns = predictor(np.concatenate(pixels))
    return batch


def _timed(items, clock):
    items = iter(items)
    while True:
        began = time.perf_counter()
        item = next(items, None)
        clock.waiting += time.perf_counter() - began
        if item is None:
            return
        yield item
