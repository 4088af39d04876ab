"""A linear probe: new heads on frozen features, which are computed once.

    features   each image once, as evaluation sees it: of the class token, and of a distilled model
               the distillation token's too; kept in the run's folder, so that a run goes on
    heads      multinomial logistic regression by L-BFGS, one for each token's features

The weight decay is chosen by a part of the training images that is held out; after that the heads
are fitted to all of them. The validation images choose nothing.
"""

from ast import literal_eval
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deit_fast.batch_inference import digest
from deit_fast.distill import checkpoints, evaluate
from deit_fast.distill.datasets import ImageSet
from deit_fast.engine import data_config

PART = 512  # images whose features are one file
DECAYS = tuple(10.0**e for e in range(2, -5, -1))  # for features of variance 1, strongest first
HELD_OUT = 0.2  # of the training images, to choose the weight decay
ITERATIONS = 200  # of L-BFGS


def heads_of(model: nn.Module) -> list[nn.Linear]:
    """The linear heads of a timm model, that of the class token first.

    Raises:
        ValueError: It has none that is linear.
    """
    found = model.get_classifier()  # type: ignore[operator]
    heads = list(found) if isinstance(found, tuple) else [found]
    if not all(isinstance(head, nn.Linear) for head in heads):
        kinds = ", ".join(type(head).__name__ for head in heads)
        raise ValueError(f"model: its head is {kinds}, expected a linear layer for a probe")
    return heads


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """What each head reads: (B, heads, features) of (B, C, H, W), normalised."""
    x = model.forward_features(images)  # type: ignore[operator]
    if isinstance(model.get_classifier(), tuple):  # type: ignore[operator]
        return x[:, :2]
    return model.forward_head(x, pre_logits=True)[:, None]  # type: ignore[operator]


class Features:
    """Features of a set of images, computed once and kept in files.

    Attributes:
        values: (n, heads, features) fp32, of the readable images.
        labels: int64 (n,).
        skipped: Name of each unreadable image, and why.
    """

    def __init__(self, values: Tensor, labels: Tensor, skipped: list[tuple[str, str]]):
        self.values, self.labels, self.skipped = values, labels, skipped


def extract(
    model: nn.Module, images: ImageSet, folder: Path, *, batch_size: int, workers: int,
    dtype: torch.dtype | None, progress: Callable[[int], None] = lambda done: None,
) -> Features:  # fmt: skip
    """Compute the features of `images`; what `folder` holds of them is not computed again.

    Args:
        model: In eval mode, on its device.
        images: Of the mode that the model expects.
        folder: Gets a file for every 512 images, whole or not at all.
        batch_size: Images in a forward pass.
        workers: Processes that decode.
        dtype: Of autocast, or None.
        progress: Told how many images are done.

    Raises:
        ValueError: No image of a part could be read, or the files are of other images or weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = f"{digest(model)} {data_config(model)} {dtype}"
    values, places, skipped = [], [], []
    for first in range(0, len(images), PART):
        numbers = range(first, min(first + PART, len(images)))
        path = folder / f"{first:07}.safetensors"
        names = [images.name(i) for i in numbers]
        part = _kept(path, key, names) if path.exists() else None
        if part is None:
            part = _computed(model, images, numbers, batch_size, workers, dtype)
            _keep(path, key, names, part)
        features, read, lost = part
        values.append(features)
        places += read
        skipped += lost
        progress(numbers[-1] + 1)
    if not places:
        raise ValueError(f"images: none of {len(images)} could be read")
    labels = torch.from_numpy(images.labels[np.array(places)])
    return Features(torch.cat(values), labels, skipped)


def _computed(model, images, numbers, batch_size, workers, dtype):
    skipped: list[tuple[str, str]] = []
    read, found = [], []
    for some, x in evaluate.batches(model, images, batch_size, workers, skipped, numbers):
        with torch.inference_mode(), torch.autocast(x.device.type, dtype, enabled=bool(dtype)):
            found.append(features_of(model, x).float().cpu())
        read += some
    heads = heads_of(model)
    none = torch.empty(0, len(heads), heads[0].in_features)
    return torch.cat([none, *found]), read, skipped


def _keep(path, key, names, part):
    values, read, skipped = part
    about = {"key": key, "names": repr(names), "skipped": repr(skipped)}
    content = save({"features": values, "numbers": torch.tensor(read)}, about)
    checkpoints.write_atomically(path, lambda file: file.write(content))


def _kept(path, key, names):
    """A part as it was kept; None where it is damaged or of something else."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        if about["key"] != key or about["names"] != repr(names):
            return None
        tensors = load_file(path)
        return tensors["features"], tensors["numbers"].tolist(), literal_eval(about["skipped"])
    except (SafetensorError, OSError, KeyError, ValueError, SyntaxError):
        return None


def fit(features: Features, classes: int, seed: int) -> tuple[list[Tensor], list[Tensor], float]:
    """Fit the heads.

    Args:
        features: Of the training images.
        classes: How many there are.
        seed: Decides which images choose the weight decay.

    Returns:
        Weights (classes, features) and biases (classes,) of each head in fp32, and the weight
        decay.
    """
    held = torch.from_numpy(_held_out(features.labels.numpy(), seed))
    decay = DECAYS[len(DECAYS) // 2]
    if held.any() and not held.all():
        decay = _best_decay(features, classes, held)
    heads = range(features.values.shape[1])
    fitted = [_Regression(features.values[:, h], features.labels, classes) for h in heads]
    found = [one.fit(decay) for one in fitted]
    return [w.float() for w, _ in found], [b.float() for _, b in found], decay


def _best_decay(features, classes, held):
    """The decay with the most correct images among those held out; of equals the least loss."""
    x, y = features.values, features.labels
    heads = [_Regression(x[~held, h], y[~held], classes) for h in range(x.shape[1])]
    scores = []
    for decay in DECAYS:
        logits = torch.zeros(int(held.sum()), classes, dtype=torch.float64)
        for h, head in enumerate(heads):
            w, b = head.fit(decay)
            logits += (x[held, h].double() @ w.T + b).log_softmax(-1)
        right = (logits.argmax(1) == y[held]).sum().item()
        scores.append((right, -nn.functional.cross_entropy(logits, y[held]).item(), decay))
    return max(scores)[2]


def _held_out(labels, seed):
    """A mask: a fifth of each class with five images or more, of others one if there are two."""
    draw = np.random.RandomState(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = draw.permutation(np.flatnonzero(labels == label))
        count = int(len(places) * HELD_OUT) or int(len(places) > 1)
        held[places[:count]] = True
    return held


class _Regression:
    """Logistic regression in fp64, of features that are scaled to variance 1.

    Args:
        x: (n, features).
        y: int64 (n,).
        classes: How many there are.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: int):
        x = x.double()
        self.mean, deviation = x.mean(0), x.std(0, correction=0)
        constant = deviation <= 1e-6 * (1 + self.mean.abs())
        self.deviation = torch.where(constant, torch.inf, deviation)
        self.z, self.y = (x - self.mean) / self.deviation, y
        self.w = torch.zeros(classes, x.shape[1], dtype=torch.float64)
        self.b = torch.zeros(classes, dtype=torch.float64)

    def fit(self, decay: float) -> tuple[Tensor, Tensor]:
        """Weights and biases for features as they are; begins where the last call ended."""
        w, b = self.w.requires_grad_(), self.b.requires_grad_()
        solver = torch.optim.LBFGS(
            [w, b], max_iter=ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-5,
            tolerance_change=1e-8,
        )  # fmt: skip

        def loss():
            solver.zero_grad()
            value = nn.functional.cross_entropy(self.z @ w.T + b, self.y)
            value = value + decay * w.square().sum() / (2 * len(self.y))
            value.backward()
            return value

        with torch.enable_grad():
            solver.step(loss)
        self.w, self.b = w.detach(), b.detach()
        scaled = self.w / self.deviation
        return scaled, self.b - scaled @ self.mean


def put(model: nn.Module, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Write fitted heads into the model."""
    with torch.no_grad():
        for head, w, b in zip(heads_of(model), weights, biases, strict=True):
            head.weight.copy_(w)
            if head.bias is None:
                raise ValueError("model: its head has no bias, expected one for a probe")
            head.bias.copy_(b)
