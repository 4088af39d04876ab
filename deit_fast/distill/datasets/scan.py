"""Looking at every image of a set, in worker processes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from deit_fast.images import CHUNK, begin_worker

from .image_set import ImageSet


class _Looks(Dataset):
    def __init__(self, images: ImageSet, look: Callable[[ImageSet, int], Any]):
        self.images, self.look = images, look

    def __getitem__(self, i: int) -> Any:
        return self.look(self.images, i)


def scan(
    images: ImageSet, look: Callable[[ImageSet, int], Any], workers: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[Any]:  # fmt: skip
    """Call a function for each image.

    Args:
        images: The set.
        look: Gets the set and an index. What it returns can be pickled.
        workers: Processes that call it; 0: this one.
        progress: Told how many images are done.

    Yields:
        What `look` returned, in the images' order.
    """
    chunks = [range(i, min(i + CHUNK, len(images))) for i in range(0, len(images), CHUNK)]
    sampler: Any = chunks  # ranges of indices are as good as lists
    loader: DataLoader = DataLoader(
        _Looks(images, look),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # or it would draw from the model's
    )
    done = 0
    for looks in loader:
        yield from looks
        done += len(looks)
        progress(done)
