"""What a run learns from: labels and perhaps a live teacher, or a soft-label store."""

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn

from . import augment
from .datasets import ImageSet
from .distributed import Ranks
from .recipe import Recipe
from .store import soft_labels
from .store.compatibility import views_of
from .store.format import Damaged, Unwritten
from .store.reader import Store
from .student import Settings
from .teacher import Objective


class ImageSource:
    """Images with their labels, and the teacher if there is one.

    Args:
        images: The training set.
        settings: Of the run.
        recipe: Of the run.
        config: timm's data configuration of the student.
        student: The model that learns.
        teacher: The live teacher, or None.
        per_step: Images of this rank in an update.
        ranks: Who shares an epoch.
        workers: Processes that decode and augment.

    Attributes:
        objective: (the model's output, images, *targets) -> loss.
        mixup: Applied to a whole batch, or None.
        batches: What `loader` yields, begun for each epoch.
        loader: Yields (images, labels, unreadable).
        notes: What to report at the beginning.

    Raises:
        ValueError: An epoch has less than one batch.
    """

    def __init__(
        self, images: ImageSet, settings: Settings, recipe: Recipe, config: dict,
        student: nn.Module, teacher: nn.Module | None, per_step: int, ranks: Ranks, workers: int,
    ):  # fmt: skip
        self.notes: list[str] = []
        weights = class_weights(images.labels) if recipe.balance == "loss" else None
        self.objective = Objective(recipe, settings.distill, teacher, student, weights)
        self.mixup = None
        if recipe.mixes:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob, label_smoothing=recipe.label_smoothing,
                num_classes=len(images.classes),
            )  # fmt: skip
        self.batches = augment.Batches(
            len(images), per_step, recipe.repeated_aug, settings.seed, ranks.rank, ranks.world_size,
            balance=images.labels if recipe.balance == "sampler" else None,
        )  # fmt: skip
        _require_updates(len(self.batches), recipe, len(self.batches.sampler), ranks)
        augmented = augment.Augmented(images, augment.transform_of(recipe, config))
        self.loader = augment.loader(augmented, self.batches, workers)


class StoreSource:
    """A teacher's soft labels of views that are recomputed; Mixup is in them.

    Args and attributes are those of `ImageSource`, whose labels and teacher the store replaces.

    Raises:
        ValueError: The store is of something else, or an epoch has less than one batch.
    """

    def __init__(
        self, store: Store, images: ImageSet, settings: Settings, recipe: Recipe, config: dict,
        per_step: int, ranks: Ranks, workers: int,
    ):  # fmt: skip
        if recipe.balance != "none":
            raise ValueError(
                f"balance: {recipe.balance!r} with a store, expected 'none': it has each image "
                "once, and no labels are learnt"
            )
        self.store, self.recipe, self.ranks = store, recipe, ranks
        records = store.manifest.records
        views, self.notes = views_of(store, images, recipe, config)
        self.objective = soft_labels.soft_label_loss
        self.mixup = None
        self.batches = soft_labels.PairBatches(
            records, [], per_step, settings.seed, ranks.rank, ranks.world_size
        )  # of epochs that are chosen when the run begins
        rank_images = 2 * (records // 2 // ranks.world_size)
        _require_updates(len(self.batches), recipe, rank_images, ranks)
        dataset = soft_labels.SoftLabelDataset(store, views)
        self.loader = soft_labels.loader(dataset, self.batches, workers)

    def choose_epochs(self) -> list[int]:
        """Take the first epochs of the store that are whole, one for each of a new run.

        No more epochs are read than are needed. Every rank makes this call.

        Raises:
            ValueError: There are not enough; the message says why.
        """
        epochs, damages = self._verify(list(range(self.store.manifest.epochs)))
        self._require_epochs(epochs, damages)
        return epochs

    def learn_from(self, epochs: list[int]) -> None:
        """Use these epochs of the store, one for each of this run."""
        self.batches.epochs = epochs

    def require_whole(self, first: int) -> None:
        """Verify the epochs that are still to come, from this run's epoch `first` on.

        Raises:
            Damaged: One is not whole.
        """
        _, damages = self._verify(self.batches.epochs[first:])
        if damages:
            raise next(iter(damages.values()))

    def _verify(self, epochs: list[int]) -> tuple[list[int], dict[int, Damaged]]:
        """Split epochs into those that are whole, until there are enough, and those that are not.

        The ranks share the reading.
        """
        whole: list[int] = []
        damages: dict[int, Damaged] = {}
        ranks, need = self.ranks, self.recipe.epochs
        for i in range(0, len(epochs), ranks.world_size):
            if len(whole) >= need:
                break
            mine = epochs[i + ranks.rank : i + ranks.rank + 1]
            for some in ranks.all_gather([(epoch, self.store.damage(epoch)) for epoch in mine]):
                whole += [epoch for epoch, damage in some if damage is None]
                damages |= {epoch: damage for epoch, damage in some if damage is not None}
        return whole[:need], damages

    def _require_epochs(self, epochs: list[int], damages: dict[int, Damaged]) -> None:
        kinds: dict[str, dict[int, Damaged]] = {"damaged": {}, "not written": {}}
        for epoch, damage in damages.items():
            kinds["not written" if isinstance(damage, Unwritten) else "damaged"][epoch] = damage
        if len(epochs) < self.recipe.epochs:
            why = "; ".join(
                f"{len(found)} {_are(found)} {kind}: {next(iter(found.values()))}"
                for kind, found in kinds.items()
                if found
            )
            raise ValueError(
                f"epochs: {self.recipe.epochs}, but {self.store.folder} has {len(epochs)} "
                f"that can be used{why and f' ({why})'}"
            )
        self.notes += [f"{damage}: this epoch is left out" for damage in kinds["damaged"].values()]
        if found := kinds["not written"]:
            named = ", ".join(map(str, found))
            self.notes.append(
                f"store: {len(found)} epoch{'s' * (len(found) > 1)} {_are(found)} not written, and "
                f"left out: {named}"
            )


def class_weights(labels: np.ndarray) -> Tensor:
    """Weigh each class by 1 / (its images), so that the mean over all images is 1.

    Args:
        labels: int64 (n,).

    Returns:
        fp32 (classes,), up to the last class that has an image; 0 for those that have none.
    """
    counts = np.bincount(labels)
    there = counts > 0
    weights = np.zeros(len(counts))
    weights[there] = len(labels) / (there.sum() * counts[there])
    return torch.from_numpy(weights).float()


def _are(some: dict) -> str:
    return "is" if len(some) == 1 else "are"


def _require_updates(updates: int, recipe: Recipe, rank_images: int, ranks: Ranks) -> None:
    if not updates:
        raise ValueError(
            f"batch: {recipe.batch}, expected at most the {rank_images} images that each of "
            f"{ranks.world_size} ranks has in an epoch"
        )
