"""What a run must have in common with the checkpoint that it resumes from."""

import dataclasses
import hashlib
from pathlib import Path

from torch import nn

from deit_fast.batch_inference import digest

from .datasets import ImageSet
from .recipe import Recipe
from .store.reader import Store
from .student import Settings

# Settings of later versions than 0.2. With their defaults they are left out, as earlier ones did.
LATER = ("freeze", "balance", "lora", "patience", "best")
LATER_DEFAULTS = {
    setting.name: setting.default
    for kind in (Settings, Recipe)
    for setting in dataclasses.fields(kind)
    if setting.name in LATER
}


def run_identity(
    settings: Settings, recipe: Recipe, images: ImageSet, store: Store | None,
    model: nn.Module, teacher: nn.Module | None, world_size: int,
) -> dict:  # fmt: skip
    """Describe a run by what decides its result, as JSON has it.

    Paths are left out, for files may be moved: weights, teacher and soft-label store are known by
    their digests, images by their labels.

    Args:
        settings: Of the run.
        recipe: Of the run.
        images: The training set.
        store: The soft-label store that is learnt from, or None. Which of its epochs are taken is
            not known yet: `["settings"]["store"]["epochs"]` is None.
        model: The student as it starts.
        teacher: The live teacher, or None.
        world_size: How many ranks compute a batch.
    """
    found = _without_later_defaults(dataclasses.asdict(settings))
    cfg: dict = model.pretrained_cfg  # type: ignore[assignment]  # timm gives every model one
    found["model"] = settings.model or cfg["architecture"]
    for name in ("data", "start_key", "teacher_checkpoint", "teacher_checkpoint_key"):
        del found[name]
    found["store"] = None if store is None else {"key": store.manifest.key, "epochs": None}
    found["start"] = None if settings.start is None else digest(model)
    found["teacher"] = None if teacher is None else digest(teacher)
    labels = hashlib.blake2b(images.labels.tobytes(), digest_size=8).hexdigest()
    return {
        "settings": found,
        "recipe": _without_later_defaults(dataclasses.asdict(recipe)),
        "images": {"train": len(images), "classes": images.classes, "labels": labels},
        "processes": world_size,
    }


def _without_later_defaults(found: dict) -> dict:
    return {
        name: value
        for name, value in found.items()
        if name not in LATER_DEFAULTS or value != LATER_DEFAULTS[name]
    }


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
        f"{key} {old.get(key, default)!r}, now {new.get(key, default)!r}"
        for old, new in [(was, {"processes": now["processes"]})]
        + [(was.get(part, {}), now[part]) for part in ("settings", "recipe", "images")]
        for key in [*new, *(name for name in old if name in LATER_DEFAULTS and name not in new)]
        for default in [LATER_DEFAULTS.get(key)]
        if old.get(key, default) != new.get(key, default)
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"out: {path} is of a run with other settings: {'; '.join(differences[:4])}{more} "
            "(restart throws it away)"
        )
