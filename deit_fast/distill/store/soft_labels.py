"""Learning from a soft-label store: the views and soft labels of a batch, and the loss."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit_fast.kernels import sparse_cross_entropy

from .. import augment
from .reader import Records, Store
from .views import Unreadables, View, Views


class SoftLabelDataset(Dataset):
    """`[epoch, place]` of a record -> (its view as `Views` has it, the record).

    Args:
        store: With the records.
        views: Of its images, see `compatibility.views_of`.
    """

    def __init__(self, store: Store, views: Views):
        self.store, self.views = store, views
        self._current: tuple[int, Records] | None = None  # the maps of one epoch, in each worker

    def __getitem__(self, item: tuple[int, int]) -> tuple[View, np.void]:
        epoch, place = item
        if self._current is None or epoch != self._current[0]:
            self._current = epoch, self.store.epoch(epoch)
        records = self._current[1]
        record = records[place]
        view, seed, used, unreadable = self.views[int(record["index"]), int(record["seed"])]
        if view is None:
            why = f" (the teacher saw it: {records.where(place)})"
            unreadable = [(name, reason + why) for name, reason in unreadable]
        return (view, seed, used, unreadable), record

    def collate(
        self, items: list[tuple[View, np.void]]
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor], Unreadables]:
        """Make a batch, see `loader`."""
        views, records = zip(*items, strict=True)
        images, _, unreadable = self.views.collate(list(views))
        classes = np.stack([record["classes"] for record in records]).astype(np.int64)
        probs = np.stack([record["probs"] for record in records])
        return images, (torch.from_numpy(classes), torch.from_numpy(probs)), unreadable


class PairBatches:
    """The batches of one rank, each a list of (epoch of the store, place), in pairs.

    Pairs are what Mixup mixed. `augment.Batches` is the same without a store. The pairs' order is
    drawn from `seed` and the epoch; a last view without a partner, and pairs that fill no batch of
    all ranks, are left out.

    Args:
        records: Of the store, in an epoch.
        epochs: Of the store, one for each epoch of training.
        batch: Views of this rank a step, even.
        seed: Of the order.
        rank: Whose batches these are.
        world_size: How many ranks share an epoch.
    """

    def __init__(
        self, records: int, epochs: list[int], batch: int, seed: int, rank: int = 0,
        world_size: int = 1,
    ):  # fmt: skip
        self.pairs, self.epochs, self.seed = records // 2, epochs, seed
        self.per_step, self.rank, self.world_size = batch // 2, rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.pairs // (self.per_step * self.world_size)

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose what the next iteration yields: that epoch, from its batch `start` on."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.pairs)
        # over the ranks: pair j of rank r is number j * world_size + r
        mine = order[self.rank :: self.world_size].tolist()
        stored = self.epochs[self.epoch]
        for i in range(self.start, len(self)):
            pairs = mine[i * self.per_step : (i + 1) * self.per_step]
            yield [(stored, place) for pair in pairs for place in (2 * pair, 2 * pair + 1)]


def loader(dataset: SoftLabelDataset, batches: PairBatches, workers: int) -> DataLoader:
    """Load batches, which are the same whatever `workers` is.

    Returns:
        Yields (images (B, C, H, W) fp32, (classes (B, K) int64, probabilities (B, K) fp16),
        unreadable), with None for the images where one is unreadable.
    """
    return augment.loader(dataset, batches, workers, dataset.collate)


def soft_label_loss(
    output: Tensor | tuple[Tensor, ...], images: Tensor | None, classes: Tensor, probs: Tensor
) -> Tensor:
    """Cross entropy with the stored probabilities, without label or temperature.

    Args:
        output: Logits (B, C); or of a model with a distillation token those of both heads, which
            learn the same: the mean of their losses.
        images: Not looked at: the signature is that of `teacher.Objective`.
        classes: int64 (B, K).
        probs: fp16 (B, K).

    Returns:
        A scalar in fp32.
    """
    heads = output if isinstance(output, tuple) else (output,)
    losses = [sparse_cross_entropy(logits, classes, probs) for logits in heads]
    return sum(losses[1:], losses[0]) / len(losses)
