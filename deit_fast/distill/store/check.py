"""Asking the teacher again."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .. import recipe
from ..datasets import open_images
from ..student import AMP
from ..teacher import load_teacher
from .files import Store
from .pictures import require_readable
from .read import Taught, pictures_of, settings_of
from .write import answer, config_of, teacher_of


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
    report: Callable[[dict], None] = lambda event: None,
) -> dict:
    """Make pictures of a store again, ask its teacher again, and compare (TinyViT's check mode).

    data, teacher, teacher_checkpoint and its key: as for `write`. samples: at least so many
    records, in whole passes of the teacher as they were written, drawn by `seed` from the epochs
    that are whole. amp: None for the store's. report: gets dicts with "event": "note".

    Returns "records", how many were compared; "mean_difference", the mean absolute difference of
    the probabilities, largest with largest; "different_indices", the rate of classes that are not
    the same in their place. On the same kind of machine, of the same device and versions, as wrote
    the store both are 0. Raises ValueError for another teacher or data set, an image that cannot
    be read, and where no epoch is whole.
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
    if (now := teacher_of(model)) != manifest.teacher:
        raise ValueError(f"teacher: {teacher} is {now}, expected that of {found.folder}, "
                         f"{manifest.teacher}")  # fmt: skip
    config = config_of(model, size)
    images.mode = {1: "L", 3: "RGB"}[config["input_size"][0]]
    making = recipe.load("deit", **settings_of(found))  # of which nothing else is looked at
    pictures, notes = pictures_of(found, images, making, config)
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
    taught = Taught(found, pictures)
    for i in sorted(draw.choice(len(blocks), count, replace=False).tolist()):
        epoch, number, block = blocks[i]
        records = epochs[epoch].block(number, block)
        first = epochs[epoch].firsts[number] + block * manifest.batch
        places = range(first, first + len(records))
        batch, _, unreadable = taught.collate([taught[epoch, place] for place in places])
        require_readable(batch, unreadable)
        classes, probs = answer(model, batch, amp or manifest.amp, manifest.k)
        differences += np.abs(probs.astype(np.float64) - records["probs"]).sum()
        others += (classes != records["classes"]).sum()
        total += len(records)
    return {
        "records": total,
        "mean_difference": float(differences / (total * manifest.k)),
        "different_indices": float(others / (total * manifest.k)),
    }
