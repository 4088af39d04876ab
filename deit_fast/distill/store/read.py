"""Reading a store: what a student sees and is to say."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit_fast.kernels import sparse_cross_entropy

from .. import augment
from ..datasets import ImageSet
from ..recipe import Recipe
from ..student import Settings
from .files import Store
from .pictures import SETTINGS, Pictures, describe, identify
from .write import notes_on, other_pixels


def settings_of(store: Store) -> dict:
    """Of a recipe that trains from it: what makes the pictures, each of which comes once."""
    return {name: store.manifest.transform[name] for name in SETTINGS} | {"repeated_aug": 1}


def adopt(store: Store, settings: Settings) -> Settings:
    """The settings with the pictures' size and normalisation, which are the store's. Raises
    ValueError where they say otherwise, or say what a store decides."""
    transform = store.manifest.transform
    found = {"img_size": transform["input_size"][1]}
    found |= {name: tuple(transform[name]) for name in ("mean", "std")}
    for name, value in found.items():
        given = getattr(settings, name)
        if given is not None and given != value:
            raise ValueError(f"{name}: {given}, but the pictures of {store.folder} have {value}")
    if settings.count is not None:
        raise ValueError(f"count: {settings.count}, but the images are those of {store.folder}")
    return replace(settings, **found)


def pictures_of(
    store: Store, images: ImageSet, recipe: Recipe, config: dict
) -> tuple[Pictures, list[str]]:
    """The very pictures that the teacher saw, and notes on versions that are not those they were
    made with. Raises ValueError for another recipe or size, another data set, or where the same
    comes out with other pixels or not at all."""
    there, pictures = store.manifest, Pictures(images, recipe, config, tries=1)
    if recipe.repeated_aug != 1:
        raise ValueError(f"repeated_aug: {recipe.repeated_aug}, expected 1: an epoch of "
                         f"{store.folder} has each image once")  # fmt: skip
    for what, was, now in (("transform", there.transform, describe(recipe, config)),
                           ("data", there.images, identify(images))):  # fmt: skip
        differences = [f"{k} {was[k]!r}, now {now[k]!r}" for k in now if was[k] != now[k]]
        if differences:
            raise ValueError(
                f"store: {store.folder} is of another {what}: {'; '.join(differences)}"
            )
    if pictures.sample(there.seed, there.sample["images"]) != there.sample:
        raise other_pixels(store.folder, there)
    return pictures, notes_on(there)


class Taught(Dataset):
    """`[epoch, place]` of a record -> its picture and what the teacher said of it."""

    def __init__(self, store: Store, pictures: Pictures):
        self.store, self.pictures = store, pictures
        self.number = self.records = None

    def __getitem__(self, item):
        epoch, place = item
        if epoch != self.number:  # the maps of one epoch at a time, in each worker
            self.number, self.records = epoch, self.store.epoch(epoch)
        record = self.records[place]
        image, *known, unreadable = self.pictures[int(record["index"]), int(record["seed"])]
        if image is None:
            why = f" (the teacher saw it: {self.records.where(place)})"
            unreadable = [(name, reason + why) for name, reason in unreadable]
        return (image, *known, unreadable), record

    def collate(self, items):
        pictures, records = zip(*items, strict=True)
        images, _, unreadable = self.pictures.collate(pictures)
        classes = np.stack([record["classes"] for record in records]).astype(np.int64)
        probs = np.stack([record["probs"] for record in records])
        return images, (torch.from_numpy(classes), torch.from_numpy(probs)), unreadable


class Batches:
    """The batches of one process, each a list of (epoch of the store, place), in pairs: they are
    what Mixup mixed. `augment.Batches` is the same without a store.

    epochs: of the store, one for each epoch of training. batch: pictures of this process a step,
    even. The pairs' order is drawn from `seed` and the epoch; a last picture without a partner, and
    pairs that fill no batch of all processes, are left out.
    """

    def __init__(
        self, records: int, epochs: list[int], batch: int, seed: int, rank: int = 0, world: int = 1
    ):
        self.pairs, self.epochs, self.seed = records // 2, epochs, seed
        self.per_step, self.rank, self.world = batch // 2, rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.pairs // (self.per_step * self.world)

    def begin(self, epoch: int, start: int = 0) -> None:
        """What the next pass yields: that epoch of training, from its batch `start` on."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.pairs)
        # over the processes: pair j of process r is number j * world + r
        mine = order[self.rank :: self.world].tolist()
        stored = self.epochs[self.epoch]
        for i in range(self.start, len(self)):
            pairs = mine[i * self.per_step : (i + 1) * self.per_step]
            yield [(stored, place) for pair in pairs for place in (2 * pair, 2 * pair + 1)]


def loader(taught: Taught, batches: Batches, workers: int) -> DataLoader:
    """Yields (images (B, C, H, W) fp32, (classes (B, K) int64, probabilities (B, K) fp16),
    unreadable), the same whatever `workers` is; images None where one is unreadable."""
    return augment.loader(taught, batches, workers, taught.collate)


def objective(output, images: Tensor, classes: Tensor, probs: Tensor) -> Tensor:
    """The loss, a scalar in fp32: cross entropy with the stored answers, neither label nor
    temperature. output: logits (B, C), or of a model with a distillation token those of both heads,
    which learn the same: the mean of their losses. images are not looked at."""
    heads = output if isinstance(output, tuple) else (output,)
    return sum(sparse_cross_entropy(logits, classes, probs) for logits in heads) / len(heads)
