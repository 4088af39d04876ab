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

from ..augment import TRIES, Augmented, reseed, transform_of
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
    """`[index, seed]` -> (image (C, H, W) fp32 or None, seed, index of the image used, unreadable),
    to be put together by `collate`. tries: how many images may be tried for one: for the writer as
    `augment.Augmented`; for what reads a store 1, or a student would see what no teacher saw."""

    def __init__(self, images: ImageSet, recipe: Recipe, config: dict, tries: int = TRIES):
        self.tries = tries
        self.augmented = Augmented(images, transform_of(recipe, config))
        self.mixup = None
        if recipe.mixes:  # of one class: the labels are nobody's
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob, mode="pair",
                switch_prob=recipe.mixup_switch_prob, label_smoothing=0.0, num_classes=1,
            )  # fmt: skip

    def __getitem__(self, item):
        index, seed = item
        image, used, unreadable = self.augmented.make(index, seed, self.tries)
        return image, seed, used, unreadable

    def collate(self, items) -> tuple[Tensor | None, list[int], list[tuple[str, str]]]:
        """Pictures (B, C, H, W) fp32, mixed in pairs; indices of the images they are of; and the
        (name, reason) of unreadable images. None instead of pictures where one could not be had,
        with the reasons of that one."""
        images, seeds, used, unreadable = zip(*items, strict=True)
        for image, reasons in zip(images, unreadable, strict=True):
            if image is None:
                return None, list(used), reasons
        batch = torch.stack(images)
        if self.mixup is not None:
            for i in range(0, len(batch) - 1, 2):
                reseed(seeds[i] ^ seeds[i + 1])
                self.mixup(batch[i : i + 2], torch.zeros(2, dtype=torch.int64))  # in place
        return batch, list(used), [one for some in unreadable for one in some]

    def sample(self, seed: int, of: list[int] | None = None) -> dict:
        """ "pictures", a digest of those that some of the images and `seed` make: another one is
        what other pixels, another version of a package or another processor can cause; "images",
        the indices of these images, as of another sample if `of` are its own: all must be readable.
        """
        # Not default_rng: numpy keeps only RandomState's stream the same from version to version.
        draw = np.random.RandomState(seed)
        count = len(self.augmented)
        tries = self.tries if of is None else 1
        indices = of or np.linspace(0, count - 1, min(SAMPLED, count)).astype(int).tolist()
        seeds = draw.randint(2**31 - 1, size=len(indices)).tolist()
        items = []
        for index, one in zip(indices, seeds, strict=True):
            image, used, unreadable = self.augmented.make(index, one, tries)
            items.append((image, one, used, unreadable))
        batch, used, unreadable = self.collate(items)
        if of is not None:
            unreadable = [(name, f"{why} (the teacher saw it)") for name, why in unreadable]
        require_readable(batch, unreadable)
        return {"images": used, "pictures": _digest(batch.numpy().tobytes())}


def require_readable(batch, unreadable) -> None:
    """Raise ValueError where there is no batch."""
    if batch is None:
        names = "; ".join(f"{name}: {reason}" for name, reason in unreadable)
        which = "an image is" if len(unreadable) == 1 else f"{len(unreadable)} images in a row are"
        raise ValueError(f"data: {which} unreadable: {names}")
