"""What a model sees: augmented images, the same and in the same order for the same seed.

Nothing depends on which rank or worker draws, so a run that is resumed in the middle of an epoch
goes on with the very images it would have had.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

from deit_fast.images import Unreadable, begin_worker

from .datasets import ImageSet
from .recipe import Recipe

PADDING = 4  # pixels, of "pad" crops: as the official code for CIFAR's 32 pixels
TRIES = 10  # unreadable images in a row, after which something else must be wrong


def transform_of(recipe: Recipe, config: dict) -> Callable[[Image.Image], Tensor]:
    """Build timm's training transform: PIL image -> float32 (C, H, W), normalised.

    Args:
        recipe: Its augmentation.
        config: timm's data configuration (`deit_fast.engine.data_config(model)`).
    """
    chain = create_transform(
        config["input_size"],
        is_training=True,
        scale=(recipe.scale, 1.0),
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=None if recipe.auto_augment == "none" else recipe.auto_augment,
        interpolation=recipe.interpolation,
        mean=config["mean"],
        std=config["std"],
        re_prob=recipe.erasing,
        re_mode="pixel",
    )
    for step in chain.transforms:
        for op in getattr(step, "ops", [op for some in getattr(step, "policy", ()) for op in some]):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    if recipe.crop == "pad":  # in the place of the resized crop, as the official code does
        size = config["input_size"][1:]
        resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
        chain.transforms[:1] = [resize, transforms.RandomCrop(size, padding=PADDING)]
    return chain


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's, but black for no bit: RandAugment's highest level, which Pillow 13 refuses."""
    if bits > 0:
        return auto_augment.posterize(image, bits, **kwargs)
    return Image.new(image.mode, image.size)


def reseed(seed: int) -> None:
    """Seed every generator that timm's transforms and Mixup draw from, on the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


class Augmented(Dataset):
    """`[index, seed]` -> (image, label, unreadable).

    An unreadable image gives way to the next one, and `unreadable` lists the (name, reason) of
    those on the way. After TRIES of them image is None: an error that a worker raised would come
    wrapped in a page of others.

    Args:
        images: What is augmented.
        transform: Of a PIL image, to float32 (C, H, W).
    """

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        image, index, unreadable = self.make(*item)
        return image, -1 if image is None else int(self.images.labels[index]), unreadable

    def make(
        self, index: int, seed: int, tries: int = TRIES
    ) -> tuple[Tensor | None, int, list[tuple[str, str]]]:
        """Augment an image, or the next one that can be read.

        Args:
            index: Of the image.
            seed: Of its augmentation.
            tries: How many images may be tried.

        Returns:
            The augmented image or None, the index of the image that was used, and (name, reason) of
            the unreadable ones.
        """
        unreadable = []
        for _ in range(min(tries, len(self.images))):
            try:
                image = self.images.image(index)
                break
            except Unreadable as error:
                unreadable.append((self.images.name(index), str(error)))
                index = (index + 1) % len(self.images)
        else:
            return None, -1, unreadable
        reseed(seed)
        return self.transform(image), index, unreadable


def _collate(items: list) -> tuple:
    for image, _, unreadable in items:
        if image is None:
            return None, None, unreadable
    images, labels, unreadable = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), [one for some in unreadable for one in some]


def balanced(labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Draw as many images as there are, of each class equally many, or one more or less.

    An image comes in proportion to 1 / (images of its class), rounded up or down at random:
    systematic sampling, whose draws vary less than independent ones.

    Args:
        labels: int64 (n,).
        draw: Decides which images come more often than others of their class.

    Returns:
        int64 (n,), numbers of images, in no useful order.
    """
    counts = np.bincount(labels)
    order = draw.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    reached = np.cumsum(1 / counts[labels[order]])  # the last one is how many classes there are
    points = (np.arange(len(labels)) + draw.random()) * (reached[-1] / len(labels))
    return order[np.searchsorted(reached, points, side="right").clip(max=len(labels) - 1)]


class Batches:
    """The batches of one rank, each a list of (index, seed), for an epoch after the other.

    Args:
        count: Images of the whole set.
        batch: Images of this rank a step.
        repeated_aug: Above 1 an image comes that many times in a row, over the ranks, and an epoch
            takes as many augmented images as there are images, so that it sees only some of them
            (timm's RepeatAugSampler, the official one).
        seed: Of order and augmentation, with the epoch.
        rank: Whose batches these are.
        world_size: How many ranks share an epoch.
        balance: Labels int64 (count,), by which every epoch draws anew with `balanced`; None: an
            epoch has each image once.
    """

    def __init__(
        self, count: int, batch: int, repeated_aug: int, seed: int, rank: int = 0,
        world_size: int = 1, balance: np.ndarray | None = None,
    ):  # fmt: skip
        self.balance = balance
        self.batch, self.seed, self.rank, self.world_size = batch, seed, rank, world_size
        self.epoch = self.start = 0
        options: dict[str, Any] = {"num_replicas": world_size, "rank": rank}
        everything: Any = range(count)  # samplers ask a data set for nothing but its length
        if repeated_aug > 1:
            whole = 256 if count >= 256 else 0  # timm 1.0.31's own default, not yet 1.0.26's
            self.sampler = RepeatAugSampler(
                everything, num_repeats=repeated_aug, selected_round=whole, **options
            )
        else:
            self.sampler = DistributedSampler(everything, drop_last=True, **options)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose what the next iteration yields: that epoch, from its batch `start` on."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draw = np.random.default_rng((self.seed, self.epoch))
        self.sampler.set_epoch(int(draw.integers(2**31)))
        # for the whole epoch, over the ranks: item j of rank r is number j * world_size + r
        size = len(self.sampler), self.world_size
        seeds = draw.integers(2**31, size=size)[:, self.rank].tolist()
        images = np.fromiter(self.sampler, np.int64)
        if self.balance is not None:  # the same draw on every rank, from numbers of its own
            draw = np.random.default_rng((self.seed, self.epoch, 1))
            images = balanced(self.balance, draw)[images]
        items = list(zip(images.tolist(), seeds, strict=True))
        for i in range(self.start, len(self)):
            yield items[i * self.batch : (i + 1) * self.batch]


def loader(
    data: Dataset, batches: Iterable[list], workers: int, collate: Callable[[list], Any] = _collate
) -> DataLoader:
    """Load batches, which are the same whatever `workers` is.

    Args:
        data: `Augmented` images, or another data set with its own `collate`.
        batches: Lists of what `data` is asked for; begun again for each iteration.
        workers: Processes that decode and augment; 0: this one.
        collate: Makes a batch of a list of items.

    Returns:
        Yields (images (B, C, H, W) fp32, labels (B,) int64, unreadable), or (None, None,
        unreadable) where an image could not be had.
    """
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=begin_worker,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the model's
    )
