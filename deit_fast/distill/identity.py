"""What a run must have in common with the checkpoint that it resumes from."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from torch import nn

from deit_fast.batch_inference import digest

from .datasets import ImageSet, Subset
from .recipe import Recipe
from .store.reader import Store
from .student import Settings

ADDED = {"holdout": 0.0}  # settings that checkpoints of older versions lack, and what they meant


def run_identity(
    settings: Settings, recipe: Recipe, images: ImageSet, validation: ImageSet, store: Store | None,
    model: nn.Module, teacher: nn.Module | None, world_size: int,
) -> dict:  # fmt: skip
    """Describe a run by what decides its result, as JSON has it.

    Paths are left out, for files may be moved: weights, teacher and soft-label store are known by
    their digests, images by their labels.

    Args:
        settings: Of the run.
        recipe: Of the run.
        images: The training set.
        validation: The validation set. If it was split off from the training set, which images are
            in it is known by a digest.
        store: The soft-label store that is learnt from, or None. Which of its epochs are taken is
            not known yet: `["settings"]["store"]["epochs"]` is None.
        model: The student as it starts.
        teacher: The live teacher, or None.
        world_size: How many ranks compute a batch.
    """
    found = dataclasses.asdict(settings)
    cfg: dict = model.pretrained_cfg  # type: ignore[assignment]  # timm gives every model one
    found["model"] = settings.model or cfg["architecture"]
    for name in ("data", "start_key", "teacher_checkpoint", "teacher_checkpoint_key"):
        del found[name]
    found["store"] = None if store is None else {"key": store.manifest.key, "epochs": None}
    found["start"] = None if settings.start is None else digest(model)
    found["teacher"] = None if teacher is None else digest(teacher)
    about: dict = {"train": len(images), "classes": images.classes}
    about["labels"] = _digest(images.labels)
    if isinstance(validation, Subset):
        about["split"] = _digest(validation.indices)
    return {
        "settings": found,
        "recipe": dataclasses.asdict(recipe),
        "images": about,
        "processes": world_size,
    }


def _digest(numbers: np.ndarray) -> str:
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()


def require_same_run(path: Path, was: dict, now: dict) -> None:
    """Refuse a checkpoint of another run.

    Args:
        path: The checkpoint.
        was: Its `run_identity`.
        now: That of this run.

    Raises:
        ValueError: They differ; the message names the first four settings.
    """
    differences = [
        f"{key} {old.get(key)!r}, now {value!r}"
        for old, new in [(was, {"processes": now["processes"]})]
        + [(was.get(part, {}), now[part]) for part in ("settings", "recipe", "images")]
        for key, value in new.items()
        if old.get(key, ADDED.get(key)) != value
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"out: {path} is of a run with other settings: {'; '.join(differences[:4])}{more} "
            "(restart throws it away)"
        )
