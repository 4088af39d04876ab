"""A model on labelled images: the logits of each image, and the metrics that follow from them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from deit_fast import calibration
from deit_fast.distill import evaluate as heads
from deit_fast.distill.datasets import ImageSet

BINS = 15  # of the confidence, for the expected calibration error (Guo et al. 2017)
Z95 = 1.959964  # of the normal distribution, two-sided


@dataclass
class Evaluation(heads.Predictions):
    """What a model makes of the readable ones among some images.

    Attributes:
        logits: fp32 (n, classes), whose softmax is what the model predicts with its `heads`.
        names: Of the images.
        classes: Names of the classes.
        heads: Of a distilled model, see `deit_fast.set_heads`; else "class".
    """

    logits: np.ndarray
    names: list[str]
    classes: list[str]
    heads: str

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of each image, int64 (n,)."""
        return self.logits.argmax(1)

    @property
    def correct(self) -> np.ndarray:
        """Whether that is the label, bool (n,)."""
        return self.predicted == self.labels

    def probabilities(self, temperature: float = 1.0) -> np.ndarray:
        """The softmax of the logits at a temperature, fp64 (n, classes)."""
        return np.exp(log_softmax(self.logits, temperature))

    def scores(self, score: str) -> np.ndarray:
        """The scores for unknown images, fp64 (n,); see `deit_fast.calibration.scores`."""
        return calibration.scores(torch.from_numpy(self.logits), score).numpy().astype(np.float64)


def evaluate(
    model: nn.Module, images: ImageSet, *, batch_size: int = 64, workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Run a model over labelled images and keep the logits; what can't be read is named.

    Args:
        model: In eval mode, where and in the dtype it is to compute.
        images: Whose classes are the model's, in its order.
        batch_size: Images in a forward pass.
        workers: Processes that decode; 0: this one.
        progress: Told how many images are done.

    Raises:
        ValueError: Model and images do not fit, or no image can be read.
        FloatingPointError: A logit is not finite.
    """
    heads.check(model, images)
    classes = class_names(model, images)
    own = getattr(model, "heads", "joint") if len(heads.heads_of(model)) > 1 else "class"
    skipped: list[tuple[str, str]] = []
    read: list[int] = []
    kept: list[np.ndarray] = []
    top: dict[str, list[np.ndarray]] = {head: [] for head in heads.heads_of(model)}
    began = time.perf_counter()
    for some, x in heads.batches(model, images, batch_size, workers, skipped):
        with torch.inference_mode():
            found = heads.head_logits(model, x)
        logits = calibration.logits_of(found[own], own)
        if not logits.isfinite().all():
            raise FloatingPointError(
                f"model: a logit of head {own} is not finite in a batch of {len(some)} images"
            )
        kept.append(logits.cpu().numpy())
        for head, values in found.items():
            best = values.float().topk(min(heads.TOP, values.shape[1])).indices
            top[head].append(best.cpu().numpy())
        read += some
        if progress is not None:
            progress(len(read) + len(skipped))
    seconds = time.perf_counter() - began
    if not read:
        why = f" ({': '.join(skipped[0])})" if skipped else ""
        raise ValueError(f"images: none of {len(images)} could be read{why}")
    numbers = np.array(read, np.int64)
    return Evaluation(
        numbers, np.asarray(images.labels)[numbers],
        {head: np.concatenate(parts) for head, parts in top.items()}, skipped, seconds,
        np.concatenate(kept), [images.name(i) for i in read], classes, own,
    )  # fmt: skip


def class_names(model: nn.Module, images: ImageSet) -> list[str]:
    """Return the model's own names of its classes; without any those of the images.

    Raises:
        ValueError: The images have the same classes in another order.
    """
    cfg: dict = getattr(model, "pretrained_cfg", None) or {}
    names = list(cfg.get("label_names") or ())
    if len(names) != len(images.classes):
        return list(images.classes)
    if names != images.classes and sorted(names) == sorted(images.classes):
        raise ValueError(
            f"images: classes in the order {', '.join(images.classes[:4])}, ..., expected the "
            f"model's: {', '.join(names[:4])}, ..."
        )
    return names


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Logarithm of the softmax of logits (n, classes) at a temperature, fp64."""
    z = logits.astype(np.float64) / temperature
    z -= z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def confusion(found: Evaluation) -> np.ndarray:
    """Count labels (rows) against predictions (columns), int64 (classes, classes)."""
    count = len(found.classes)
    flat = np.bincount(found.labels * count + found.predicted, minlength=count * count)
    return flat.reshape(count, count)


def per_class(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1 (0 to 1, NaN where undefined) and support of each class.

    Precision is undefined for a class that was never predicted, recall for one without images, F1
    for one with neither.
    """
    hits, support, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    return {
        "precision": _ratio(hits, predicted), "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, support + predicted), "support": support, "predicted": predicted,
    }  # fmt: skip


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def reliability(found: Evaluation, temperature: float = 1.0) -> dict[str, list]:
    """Confidence and accuracy in `BINS` bins of equal width.

    Returns:
        {"low": edges, "high": edges, "count": images, "confidence": means or None where a bin is
        empty, "accuracy": the same}. A bin includes its high edge.
    """
    best = found.probabilities(temperature).max(1)
    place = np.clip(np.ceil(best * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, values, BINS) for values in (best, found.correct)]
    means = [[s / n if n else None for s, n in zip(of, count, strict=True)] for of in sums]
    edges = [i / BINS for i in range(BINS + 1)]
    return {
        "low": edges[:-1], "high": edges[1:], "count": count.tolist(),
        "confidence": means[0], "accuracy": means[1],
    }  # fmt: skip


def calibration_error(bins: dict[str, list]) -> float:
    """Expected calibration error, 0 to 1, of what `reliability` returned (Guo et al., eq. 3)."""
    total = sum(bins["count"])
    rows = zip(bins["count"], bins["confidence"], bins["accuracy"], strict=True)
    return float(sum(n * abs(c - a) for n, c, a in rows if n) / total)


def log_likelihood_loss(found: Evaluation, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    rows = log_softmax(found.logits, temperature)
    return float(-rows[np.arange(len(rows)), found.labels].mean())


def interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a share, 0 to 1 (Wilson 1927)."""
    share, z2 = hits / total, Z95 * Z95 / total
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 * (share * (1 - share) / total + z2 / (4 * total)) ** 0.5 / (1 + z2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def metrics(found: Evaluation, temperature: float | None = None) -> dict:
    """Sum up an evaluation; shares are from 0 to 1.

    Args:
        found: What `evaluate` returned.
        temperature: Of the calibration; None: there is none.

    Returns:
        "images", "unreadable", "top1", "top1_interval" (95%), "top5" with more than five classes,
        "balanced_accuracy" and "macro_f1" (means over the classes with images), "before" and
        with a temperature "after", each {"ece", "nll"}, and "images_per_s", decoding included.
    """
    classes = per_class(confusion(found))
    there = classes["support"] > 0
    hits = int(found.correct.sum())
    result = {
        "images": len(found.labels), "unreadable": len(found.skipped),
        "top1": hits / len(found.labels),
        "top1_interval": list(interval(hits, len(found.labels))),
        "balanced_accuracy": float(classes["recall"][there].mean()),
        "macro_f1": float(classes["f1"][there].mean()),
        "before": _calibrated(found, 1.0),
        "images_per_s": len(found.labels) / found.seconds if found.seconds else None,
    }  # fmt: skip
    if len(found.classes) > heads.TOP:
        best = found.top[found.heads]
        result["top5"] = float((best == found.labels[:, None]).any(1).mean())
    if temperature is not None:
        result["after"] = _calibrated(found, temperature)
    return result


def _calibrated(found: Evaluation, temperature: float) -> dict[str, float]:
    return {
        "ece": calibration_error(reliability(found, temperature)),
        "nll": log_likelihood_loss(found, temperature),
    }
