"""Checking a soft-label store against its teacher."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .. import recipe
from ..datasets import open_images
from ..student import AMP
from ..teacher import load_teacher
from .compatibility import recipe_settings, views_of
from .reader import Store
from .soft_labels import SoftLabelDataset
from .teacher_outputs import image_mode, teacher_identity, top_k_probabilities, view_config
from .views import require_readable


def check(
    data: str | Path,
    store: str | Path,
    teacher: str | Path,
    *,
    samples: int = 1024,
    seed: int = 0,
    teacher_checkpoint: str | Path | None = None,
    teacher_checkpoint_key: str | None = None,
    amp: str | None = None,
    backend: str = "auto",
    image_key: str = "image",
    label_key: str = "label",
    report: Callable[[dict], object] = lambda event: None,
) -> dict:
    """Recompute views of a store, ask its teacher again, and compare (TinyViT's check mode).

    On the same kind of machine, of the same device and versions, as wrote the store there is no
    difference.

    Args:
        data: As for `write`.
        store: The folder.
        teacher: As for `write`.
        samples: At least so many records, in the teacher's batches as they were written, drawn from
            the epochs that are whole.
        seed: That draws them.
        teacher_checkpoint: As for `write`.
        teacher_checkpoint_key: As for `write`.
        amp: The teacher's precision; None for the store's.
        backend: See `deit_fast.accelerate`.
        image_key: Column of a Hugging Face dataset.
        label_key: Column of a Hugging Face dataset.
        report: Gets dicts with "event": "note" and "text".

    Returns:
        "records", how many were compared; "mean_difference", the mean absolute difference of the
        probabilities, largest with largest; "different_indices", the rate of classes that are not
        the same in their place.

    Raises:
        ValueError: It is another teacher or data set, an image cannot be read, or no epoch is
            whole.
    """
    if samples < 1:
        raise ValueError(f"samples: {samples}, expected 1 or more")
    if amp is not None and amp not in AMP:
        raise ValueError(f"amp: {amp!r}, expected one of {', '.join(AMP)}")
    found = Store(store)
    manifest = found.manifest
    images = open_images(data, "train", image_key=image_key, label_key=label_key)
    size = manifest.transform["input_size"][1]
    model = load_teacher(
        teacher, len(images.classes), size, teacher_checkpoint, backend, teacher_checkpoint_key
    )
    if (now := teacher_identity(model)) != manifest.teacher:
        raise ValueError(f"teacher: {teacher} is {now}, expected that of {found.folder}, "
                         f"{manifest.teacher}")  # fmt: skip
    config = view_config(model, size)
    images.mode = image_mode(config)
    augmentation = recipe.load("deit", **recipe_settings(found))  # nothing else of it is looked at
    views, notes = views_of(found, images, augmentation, config)
    for text in notes:
        report({"event": "note", "text": text})
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    epochs = {}
    for epoch in range(manifest.epochs):
        if (damage := found.damage(epoch)) is None:
            epochs[epoch] = found.epoch(epoch)
        else:
            report({"event": "note", "text": f"{damage}: this epoch is left out"})
    if not epochs:
        raise ValueError(f"store: {found.folder} has no whole epoch")
    blocks = [(epoch, *block) for epoch, records in epochs.items() for block in records.blocks()]
    draw = np.random.default_rng(seed)
    count = min(math.ceil(samples / manifest.batch), len(blocks))
    total = differences = others = 0
    dataset = SoftLabelDataset(found, views)
    for i in sorted(draw.choice(len(blocks), count, replace=False).tolist()):
        epoch, number, block = blocks[i]
        records = epochs[epoch].block(number, block)
        first = epochs[epoch].firsts[number] + block * manifest.batch
        places = range(first, first + len(records))
        batch, _, unreadable = dataset.collate([dataset[epoch, place] for place in places])
        batch = require_readable(batch, unreadable)
        classes, probs = top_k_probabilities(model, batch, amp or manifest.amp, manifest.k)
        differences += np.abs(probs.astype(np.float64) - records["probs"]).sum()
        others += (classes != records["classes"]).sum()
        total += len(records)
    return {
        "records": total,
        "mean_difference": float(differences / (total * manifest.k)),
        "different_indices": float(others / (total * manifest.k)),
    }
