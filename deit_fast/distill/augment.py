"""What a model sees: augmented images, the same for the same seed whoever makes them, and in the
same order. Nothing depends on which process or worker draws, so a run that is resumed in the middle
of an epoch goes on with the very images it would have had."""

import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

from deit_fast.images import Unreadable, begin_worker

from .datasets import ImageSet
from .recipe import Recipe

PADDING = 4  # pixels, of "pad" crops: as the official code for CIFAR's 32 pixels
TRIES = 10  # unreadable images in a row, after which something else must be wrong


def transform_of(recipe: Recipe, config: dict):
    """timm's training transform: PIL image -> float32 (C, H, W), normalised.

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


def _posterize(image, bits, **kwargs):
    """timm's; RandAugment at its highest level keeps no bit, which Pillow 13 refuses: black."""
    if bits > 0:
        return auto_augment.posterize(image, bits, **kwargs)
    return Image.new(image.mode, image.size)


def reseed(seed: int) -> None:
    """Of every generator that timm's transforms and Mixup draw from, on the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


class Augmented(Dataset):
    """`[index, seed]` -> (image, label, unreadable); an unreadable image gives way to the next one,
    and `unreadable` lists the (name, reason) of those on the way. After TRIES of them image is
    None: an error that a worker raised would come wrapped in a page of others."""

    def __init__(self, images: ImageSet, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        image, index, unreadable = self.make(*item)
        return image, -1 if image is None else int(self.images.labels[index]), unreadable

    def make(self, index: int, seed: int, tries: int = TRIES):
        """(image or None, index of the one it was made of, unreadable) in at most `tries`."""
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


def _collate(items):
    for image, _, unreadable in items:
        if image is None:
            return None, None, unreadable
    images, labels, unreadable = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), [one for some in unreadable for one in some]


class Batches:
    """The batches of one process, each a list of (index, seed), for an epoch after the other.

    batch: images of this process a step. With `repeated_aug` above 1 an image comes that many times
    in a row, over the processes, and an epoch takes as many pictures as there are images, so that
    it sees only some of them (timm's RepeatAugSampler, the official one).
    """

    def __init__(self, count: int, batch: int, repeated_aug: int, seed: int, rank=0, world=1):
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.epoch = self.start = 0
        options = {"num_replicas": world, "rank": rank}
        if repeated_aug > 1:
            whole = 256 if count >= 256 else 0  # what timm 1.0.31 does by itself, 1.0.26 does not
            self.sampler = RepeatAugSampler(
                range(count), num_repeats=repeated_aug, selected_round=whole, **options
            )
        else:
            self.sampler = DistributedSampler(range(count), drop_last=True, **options)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch

    def begin(self, epoch: int, start: int = 0) -> None:
        """What the next pass yields: that epoch, from its batch `start` on."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draw = np.random.default_rng((self.seed, self.epoch))
        self.sampler.set_epoch(int(draw.integers(2**31)))
        # for the whole epoch, over the processes: picture j of process r is number j * world + r
        seeds = draw.integers(2**31, size=(len(self.sampler), self.world))[:, self.rank].tolist()
        pictures = list(zip(self.sampler, seeds, strict=True))
        for i in range(self.start, len(self)):
            yield pictures[i * self.batch : (i + 1) * self.batch]


def loader(data: Dataset, batches: Iterable[list], workers: int, collate=_collate) -> DataLoader:
    """Yields (images (B, C, H, W) fp32, labels (B,) int64, unreadable) of `Augmented` data, the
    same whatever `workers` is; where an image could not be had, (None, None, unreadable). batches:
    iterated anew for each pass. collate: what makes a batch of other data's items."""
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
