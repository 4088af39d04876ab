"""Attention maps of the shipped model on the images shipped with it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import deit_fast
from deit_fast.attention_weights import attention_maps, token_maps

from . import style
from .style import Picture

IMAGES = Path(deit_fast.__file__).parent / "data" / "fashion"
SHOWN = ("ankle-boot", "bag", "dress", "sandal", "shirt", "trouser")


def maps() -> list[tuple[str, np.ndarray, dict[str, np.ndarray]]]:
    """(name, pixels (28, 28), {token: map (7, 7)}) of each image: the last block, mean of heads."""
    model = deit_fast.deit_nano_fashion(pretrained=True, backend="torch").eval()
    found = []
    for name in SHOWN:
        pixels = np.asarray(Image.open(IMAGES / f"{name}.png").convert("L"))
        images = torch.from_numpy(pixels.copy())[None, :, :, None]
        (weights,) = attention_maps(model, images, -1).values()
        of = token_maps(model, images, weights.mean(1))
        found.append((name, pixels, {token: values[0].numpy() for token, values in of.items()}))
    return found


def draw() -> Picture:
    """A column an image: the image, and how much each token attends to each patch."""
    below = (
        "The shipped deit_nano_fashion on images of Fashion-MNIST; last block, mean of the heads.\n"
        "More orange: more attention, from each map's least to its most."
    )
    figure = style.frame(5.0, "What the class and the distillation token attend to", below)
    width, height = figure.get_size_inches()
    side, left, top = 1.08, 0.98, 1.16
    words = []
    for column, (name, pixels, tokens) in enumerate(maps()):
        x = left + column * (side + 0.08)
        rows = {"image": pixels, **tokens}
        for row, (kind, values) in enumerate(rows.items()):
            y = height - top - side - row * (side + 0.08)
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            axes.imshow(_shades(values, pixels, kind), interpolation="none")
            axes.set_axis_off()
            if column == 0:
                label = kind if kind == "image" else f"{kind}\ntoken"
                figure.text(
                    (left - 0.1) / width, (y + side / 2) / height, label, ha="right", va="center",
                    fontsize=9, linespacing=1.2,
                )  # fmt: skip
        figure.text(
            (x + side / 2) / width, (y - 0.08) / height, name.replace("-", " "), ha="center",
            va="top", fontsize=9, color=style.MUTED,
        )  # fmt: skip
        most = {token: np.unravel_index(v.argmax(), v.shape) for token, v in tokens.items()}
        where = "; ".join(
            f"{token} token most to row {r + 1}, column {c + 1}" for token, (r, c) in most.items()
        )
        words.append(f"{name}: {where} of 7 x 7 patches.")
    return Picture(figure, "Attention maps of deit_nano_fashion", " ".join(words))


def _shades(values, pixels, kind):
    """RGB (28, 28): the image in gray, or with the attention to each patch in orange over it."""
    gray = pixels[..., None] / 255 * np.ones(3)
    if kind == "image":
        return np.round(gray * 255).astype(np.uint8)
    share = (values - values.min()) / (values.max() - values.min())
    share = np.round(share, 2).repeat(4, 0).repeat(4, 1)[..., None]
    attended = 0.3 * gray + 0.7 * np.array([1.0, 0.65, 0.1])
    return np.round(255 * ((1 - share) * 0.5 * gray + share * attended)).astype(np.uint8)
