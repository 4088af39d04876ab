"""Batch inference: images on disk -> classes or features, however many there are.

Decoders in worker processes feed an engine. `Predictor` does not depend on where the images come
from or where the predictions go; the command `deit-fast classify`, `deit_fast.integrations.ray` and
the examples share it.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import timm.data
import torch
from torch import Tensor, nn

from . import calibration, images
from .engine import InferenceEngine, data_config

_T = TypeVar("_T")


class Predictor:
    """`predictor(uint8 (n, H, W, C)) -> {column: numpy array of n rows}`.

    Columns are "classes" (n, topk) int64 and "scores" (n, topk) fp32 probabilities, best first; or
    with `embed` "embedding" (n, D) fp32, the input of the heads (timm's pre_logits). The
    probabilities of a calibrated model are those at its temperature (`deit_fast.calibration`).

    With `threshold` or `unknown` a class that is not predicted is -1 in "classes", and "unknown"
    (n,) bool says of which pictures there is no prediction left.

    Args:
        model: In eval mode, on the device that is to compute.
        batch_size: Images in one forward pass.
        topk: Classes per image; fewer if the model has fewer.
        embed: Compute features instead of classes.
        threshold: Classes of at least this probability alone are predicted, from 0 to 1.
        unknown: Nothing is predicted for pictures that are unknown by the model's calibration.

    Attributes:
        decoder: Decodes images for this model.
        engine: The `InferenceEngine`.
        calibration: The model's, or None.

    Raises:
        ValueError: For topk below 1, for a model without classes unless `embed`, for a threshold
            that is no probability, and for `unknown` with a model that was not calibrated. And what
            `InferenceEngine` raises.
    """

    def __init__(
        self, model: nn.Module, batch_size: int, topk: int = 5, embed: bool = False,
        threshold: float | None = None, unknown: bool = False,
    ):  # fmt: skip
        if topk < 1:
            raise ValueError(f"topk: {topk}, expected 1 or more")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold: {threshold}, expected 0 to 1, a probability")
        self.calibration = calibration.of(model)
        if unknown and (self.calibration is None or self.calibration.unknown is None):
            raise ValueError(
                "unknown: the model has no calibrated threshold, expected a folder that "
                "deit-fast finetune or deit-fast eval --calibrate wrote it into"
            )
        self.threshold, self.unknown = threshold, unknown
        classes: Any = model.num_classes  # timm's
        self.embed, self.topk = embed, min(topk, classes) or topk
        if not embed and not classes:
            raise ValueError("model: has no classes, expected embed=True")
        self.heads = getattr(model, "heads", None)
        self.decoder = images.Decoder(data_config(model))
        self.engine = InferenceEngine(
            model, batch_size, output="features" if embed else "logits", prepare=("uint8",)
        )

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Run the model.

        Args:
            pixels: What `decoder` returned, stacked: uint8 (n, H, W, C).

        Returns:
            The columns.
        """
        output = self.engine(torch.from_numpy(pixels)).float()
        if self.embed:
            return {"embedding": output.cpu().numpy()}
        scores, classes = self._probabilities(output).topk(self.topk)
        columns = {"classes": classes, "scores": scores}
        if self.threshold is not None or self.unknown:
            wanted = torch.ones_like(classes, dtype=torch.bool)
            if self.threshold is not None:
                wanted = scores >= self.threshold
            if self.unknown:
                wanted &= self._is_known(output)[:, None]
            columns["classes"] = classes.where(wanted, -1)
            columns["unknown"] = ~wanted[:, 0]
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def _probabilities(self, output: Tensor) -> Tensor:
        if self.calibration is not None:
            logits = calibration.logits_of(output, self.heads)
            return (logits / self.calibration.temperature).softmax(-1)
        return output / 2 if self.heads == "joint_softmax" else output.softmax(-1)

    def _is_known(self, output: Tensor) -> Tensor:
        assert self.calibration is not None and self.calibration.unknown is not None
        how = self.calibration.unknown
        found = calibration.scores(calibration.logits_of(output, self.heads), how.score)
        return found >= how.threshold


def label_names(model: nn.Module) -> list[str]:
    """Return the names of a model's classes.

    They are those of its configuration; without any ImageNet's for 1000 classes, else numbers.
    """
    given = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    classes: Any = model.num_classes
    if given and len(given) == classes:
        return list(given)
    if classes == 1000:
        label = timm.data.ImageNetInfo().index_to_description
        return [label(i) for i in range(1000)]
    return [f"class {i}" for i in range(classes)]


def digest(model: nn.Module) -> str:
    """Hash the weights, their names and dtypes: a resumed job must have the same."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@dataclass
class Batch:
    """Predictions for some images, in their order.

    Attributes:
        paths: The images.
        reasons: Why each is unreadable; None: it is readable.
        columns: What `Predictor` returned: a row for each readable image.
    """

    paths: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Clock:
    """Seconds a run took, and those of them in which the model waited for the decoders."""

    total: float = 0.0
    waiting: float = 0.0

    @property
    def share(self) -> float:
        """The share of the time that was spent waiting, from 0 to 1."""
        return self.waiting / self.total if self.total else 0.0


def predict(
    predictor: Predictor, paths: Iterable[str], workers: int, clock: Clock | None = None
) -> Iterator[Batch]:
    """Decode images in worker processes and predict.

    Memory holds a few chunks of decoded images per worker and one batch, whatever the number of
    paths.

    Args:
        predictor: The model and its decoder.
        paths: The images.
        workers: The number of processes that decode; 0: decode in this one.
        clock: Updated before each batch is yielded.

    Yields:
        The predictions, in the order of `paths`.
    """
    clock = Clock() if clock is None else clock
    size = predictor.engine.batch_sizes[-1]
    chunk = min(images.CHUNK, size)
    began = time.perf_counter()
    batch = Batch()
    pixels: list[np.ndarray] = []
    for chunk_paths, reasons, decoded in _timed(
        images.decode(paths, predictor.decoder, workers, chunk), clock
    ):
        if len(batch.paths) + len(chunk_paths) > size:
            yield _finish(predictor, batch, pixels)
            batch, pixels = Batch(), []
        batch.paths += chunk_paths
        batch.reasons += reasons
        if len(decoded):
            pixels.append(decoded)
        clock.total = time.perf_counter() - began
    if batch.paths:
        yield _finish(predictor, batch, pixels)
    clock.total = time.perf_counter() - began


def _finish(predictor: Predictor, batch: Batch, pixels: list[np.ndarray]) -> Batch:
    if pixels:
        batch.columns = predictor(np.concatenate(pixels))
    return batch


def _timed(items: Iterable[_T], clock: Clock) -> Iterator[_T]:
    items = iter(items)
    while True:
        began = time.perf_counter()
        item = next(items, None)
        clock.waiting += time.perf_counter() - began
        if item is None:
            return
        yield item
