"""Evaluations without a model, and sets of images in memory."""

import numpy as np
from checking import seeded
from PIL import Image

from deit_fast.distill.datasets import ImageSet
from deit_fast.finetune.evaluation import Evaluation
from deit_fast.images import Unreadable


def evaluation(logits, labels, classes=None, heads="class", skipped=()):
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels, np.int64)
    classes = classes or [f"class{i}" for i in range(logits.shape[1])]
    top = {heads: np.argsort(-logits, axis=1, kind="stable")[:, :5]}
    names = [f"{i}.png" for i in range(len(labels))]
    return Evaluation(
        np.arange(len(labels)), labels, top, list(skipped), 2.0, logits, names, classes, heads
    )


def drawn(images=400, classes=4, sure=3.0):
    """Logits from which the labels are drawn, so that temperature 1 is right; times `sure`."""
    draw = np.random.default_rng(seeded(0))
    logits = draw.normal(0, 1.5, (images, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) < draw.random((images, 1))).sum(1)
    return evaluation(sure * logits, labels)


class Noise(ImageSet):
    """Noise in colour; those in `broken` can't be read."""

    def __init__(self, labels, classes, broken=(), name="{}.png", size=(40, 48)):
        super().__init__(list(classes), np.asarray(labels, np.int64), "RGB")
        draw = np.random.default_rng(seeded(0))
        self.pixels = draw.integers(0, 256, (len(labels), *size, 3), dtype=np.uint8)
        self.broken, self.pattern = broken, name

    def name(self, i):
        return self.pattern.replace("{}", str(i))

    def image(self, i):
        if i in self.broken:
            raise Unreadable("cannot identify <image> file")
        return Image.fromarray(self.pixels[i])
