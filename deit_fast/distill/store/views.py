"""The views of a soft-label store: augmented images, made from an image's index and a seed.

The same code makes them for the teacher, which sees them first, and for the students, who see the
same bits again. Mixup or CutMix makes two new views of each two that follow each other, the first
at an even place, with what is drawn from the exclusive or of their seeds (as TinyViT's code). A
last view without a partner stays as it is.
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
from ..recipe import VIEW_SETTINGS, Recipe

SAMPLED = 64  # views that tell whether this machine makes the same ones
PACKAGES = (deit_fast, np, PIL, timm, torch, torchvision)

Unreadables = list[tuple[str, str]]  # name of an image, and why it can't be read
View = tuple[Tensor | None, int, int, Unreadables]


def describe_transform(recipe: Recipe, config: dict) -> dict:
    """Describe what decides the views, as JSON has it.

    Args:
        recipe: Its `VIEW_SETTINGS` are taken.
        config: timm's data configuration: "input_size" (channels, height, width), "mean", "std".
    """
    found = {name: getattr(recipe, name) for name in VIEW_SETTINGS}
    found = {name: float(value) if type(value) is int else value for name, value in found.items()}
    found |= {name: [float(x) for x in config[name]] for name in ("mean", "std")}
    return found | {"input_size": list(config["input_size"])}


def fingerprint(images: ImageSet) -> dict:
    """Describe a data set: counts, digests of labels and of names; not where its files lie."""
    names = (images.name(i).rpartition(": ")[2].rpartition("/")[2] for i in range(len(images)))
    return {
        "count": len(images), "classes": len(images.classes),
        "labels": _digest(images.labels.astype("<i8").tobytes()),
        "names": _digest("\0".join([*images.classes, *names]).encode("utf-8", "surrogateescape")),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of the packages that make the views."""
    return {package.__name__: str(package.__version__) for package in PACKAGES}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


class Views(Dataset):
    """`[index, seed]` -> (view (C, H, W) fp32 or None, seed, index of the image used, unreadable).

    `collate` makes a batch of them.

    Args:
        images: What the views are of.
        recipe: Its augmentation, Mixup and CutMix.
        config: timm's data configuration, for size and normalisation.
        tries: How many images may be tried for one view. For the writer as `augment.Augmented`;
            for what reads a store 1, or a student would see what no teacher saw.
    """

    def __init__(self, images: ImageSet, recipe: Recipe, config: dict, tries: int = TRIES):
        self.tries = tries
        self.augmented = Augmented(images, transform_of(recipe, config))
        self.mixup = None
        if recipe.mixes:  # of one class: the labels are nobody's
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob, mode="pair",
                switch_prob=recipe.mixup_switch_prob, label_smoothing=0.0, num_classes=1,
            )  # fmt: skip

    def __getitem__(self, item: tuple[int, int]) -> View:
        index, seed = item
        view, used, unreadable = self.augmented.make(index, seed, self.tries)
        return view, seed, used, unreadable

    def collate(self, items: list[View]) -> tuple[Tensor | None, list[int], Unreadables]:
        """Make a batch, mixed in pairs.

        Returns:
            Views (B, C, H, W) fp32; indices of the images they are of; and the unreadable images.
            None instead of views where one could not be had, with the reasons of that one.
        """
        views, seeds, used, unreadable = zip(*items, strict=True)
        for view, reasons in zip(views, unreadable, strict=True):
            if view is None:
                return None, list(used), reasons
        batch = torch.stack(views)
        if self.mixup is not None:
            for i in range(0, len(batch) - 1, 2):
                reseed(seeds[i] ^ seeds[i + 1])
                self.mixup(batch[i : i + 2], torch.zeros(2, dtype=torch.int64))  # in place
        return batch, list(used), [one for some in unreadable for one in some]

    def sample(self, seed: int, indices: list[int] | None = None) -> dict:
        """Digest a sample of the views, to see whether two machines make the same pixels.

        Another version of a package or another CPU can make others.

        Args:
            seed: Of the sample.
            indices: Of the images of another sample, all of which must be readable. None: some of
                all, spread evenly.

        Returns:
            "images", the indices, and "pictures", the digest of their views.

        Raises:
            ValueError: An image is unreadable.
        """
        # Not default_rng: numpy keeps only RandomState's stream the same from version to version.
        draw = np.random.RandomState(seed)
        count = len(self.augmented)
        tries = self.tries if indices is None else 1
        spread = indices or np.linspace(0, count - 1, min(SAMPLED, count)).astype(int).tolist()
        seeds = draw.randint(2**31 - 1, size=len(spread)).tolist()
        items = []
        for index, one in zip(spread, seeds, strict=True):
            view, used, unreadable = self.augmented.make(index, one, tries)
            items.append((view, one, used, unreadable))
        batch, all_used, unreadable = self.collate(items)
        if indices is not None:
            unreadable = [(name, f"{why} (the teacher saw it)") for name, why in unreadable]
        pixels = require_readable(batch, unreadable)
        return {"images": all_used, "pictures": _digest(pixels.numpy().tobytes())}


def require_readable(batch: Tensor | None, unreadable: Unreadables) -> Tensor:
    """Return the batch.

    Raises:
        ValueError: There is none; the message names the unreadable images.
    """
    if batch is None:
        names = "; ".join(f"{name}: {reason}" for name, reason in unreadable)
        which = "an image is" if len(unreadable) == 1 else f"{len(unreadable)} images in a row are"
        raise ValueError(f"data: {which} unreadable: {names}")
    return batch
