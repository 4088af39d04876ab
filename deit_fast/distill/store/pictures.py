"""The pictures of a store, made from an image's index and a seed: by the same code for the teacher,
which sees them first, and for the students, who see the same bits again.

Of two pictures that follow each other the first at an even place, Mixup or CutMix makes two new
ones, with what is drawn from the exclusive or of their seeds (as TinyViT's code). A last one
without a partner stays as it is.
"""

import hashlib

import numpy as np
import PIL
import timm
import torch
import torchvision
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import Dataset

import deit_fast

from ..augment import Augmented, reseed, transform_of
from ..datasets import ImageSet
from ..recipe import Recipe

# what of a recipe makes the pictures
SETTINGS = (
    "crop", "scale", "hflip", "color_jitter", "auto_augment", "interpolation", "erasing", "mixup",
    "cutmix", "mixup_prob", "mixup_switch_prob",
)  # fmt: skip
SAMPLED = 64  # pictures that tell whether this machine makes the same ones
PACKAGES = (deit_fast, np, PIL, timm, torch, torchvision)


def describe(recipe: Recipe, config: dict) -> dict:
    """What makes the pictures, as JSON has it: the recipe's `SETTINGS`, and of timm's data
    configuration "input_size" (channels, height, width), "mean" and "std"."""
    found = {name: getattr(recipe, name) for name in SETTINGS}
    found = {name: float(value) if type(value) is int else value for name, value in found.items()}
    found |= {name: [float(x) for x in config[name]] for name in ("mean", "std")}
    return found | {"input_size": list(config["input_size"])}


def identify(images: ImageSet) -> dict:
    """Of a data set: how many images and classes, digests of the labels and of the names. Where its
    files lie does not count."""
    names = (images.name(i).rpartition(": ")[2].rpartition("/")[2] for i in range(len(images)))
    return {
        "count": len(images), "classes": len(images.classes),
        "labels": _digest(images.labels.astype("<i8").tobytes()),
        "names": _digest("\0".join([*images.classes, *names]).encode("utf-8", "surrogateescape")),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that make the pictures."""
    return {package.__name__: str(package.__version__) for package in PACKAGES}


def _digest(content):
    return hashlib.blake2b(content, digest_size=8).hexdigest()


class Pictures(Dataset):
    """`[index, seed]` -> (image (C, H, W) fp32, seed, unreadable) as `augment.Augmented` has it, to
    be put together by `collate`."""

    def __init__(self, images: ImageSet, recipe: Recipe, config: dict):
        self.augmented = Augmented(images, transform_of(recipe, config))
        self.mixup = None
        if recipe.mixes:  # of one class: the labels are nobody's
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob, mode="pair",
                switch_prob=recipe.mixup_switch_prob, label_smoothing=0.0, num_classes=1,
            )  # fmt: skip

    def __getitem__(self, item):
        image, _, unreadable = self.augmented[item]
        return image, item[1], unreadable

    def collate(self, items) -> tuple[Tensor | None, list[tuple[str, str]]]:
        """Pictures (B, C, H, W) fp32, mixed in pairs, and the (name, reason) of unreadable images;
        None instead of pictures where too many in a row were."""
        images, seeds, unreadable = zip(*items, strict=True)
        if any(image is None for image in images):
            return None, unreadable[images.index(None)]
        batch = torch.stack(images)
        if self.mixup is not None:
            for i in range(0, len(batch) - 1, 2):
                reseed(seeds[i] ^ seeds[i + 1])
                self.mixup(batch[i : i + 2], torch.zeros(2, dtype=torch.int64))  # in place
        return batch, [one for some in unreadable for one in some]

    def sample(self, seed: int) -> str:
        """A digest of pictures that some of the images and `seed` make: another one is what other
        pixels, another version of a package or another processor can cause."""
        # Not default_rng: numpy keeps only RandomState's stream the same from version to version.
        draw = np.random.RandomState(seed)
        count = len(self.augmented)
        indices = np.linspace(0, count - 1, min(SAMPLED, count)).astype(int).tolist()
        seeds = draw.randint(2**31 - 1, size=len(indices)).tolist()
        batch, unreadable = self.collate([self[i] for i in zip(indices, seeds, strict=True)])
        require_readable(batch, unreadable)
        return _digest(batch.numpy().tobytes())


def require_readable(batch, unreadable) -> None:
    """Raise ValueError where there is no batch."""
    if batch is None:
        names = "; ".join(f"{name}: {reason}" for name, reason in unreadable)
        raise ValueError(f"data: {len(unreadable)} images in a row are unreadable: {names}")
