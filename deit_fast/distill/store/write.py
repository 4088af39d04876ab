"""Filling a soft-label store: the teacher over every view of every epoch."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from .. import augment, run_folder
from ..datasets import fraction, open_images
from ..distributed import Ranks
from ..interrupt import Interrupted, catch_signals
from ..recipe import Recipe
from ..student import AMP
from ..teacher import load_teacher
from .compatibility import require_same_store, version_notes
from .manifest import MANIFEST, Manifest
from .reader import Store
from .teacher_outputs import image_mode, teacher_identity, top_k_probabilities, view_config
from .views import (
    Unreadables,
    Views,
    describe_transform,
    fingerprint,
    require_readable,
    versions,
)
from .writer import Writer

MOST_CLASSES = 2**16  # of uint16

Report = Callable[[dict], object]


def write(
    data: str | Path,
    out: str | Path,
    teacher: str | Path,
    recipe: Recipe,
    *,
    epochs: int,
    k: int = 10,
    count: int | None = None,
    seed: int = 0,
    img_size: int | None = None,
    teacher_checkpoint: str | Path | None = None,
    teacher_checkpoint_key: str | None = None,
    batch: int = 256,
    amp: str = "none",
    backend: str = "auto",
    workers: int = 0,
    image_key: str = "image",
    label_key: str = "label",
    report: Report = lambda event: None,
) -> dict:
    """Store the `k` largest probabilities of a teacher for each view of `epochs` epochs.

    The same call again goes on where it stopped, and one with more epochs adds them. Under torchrun
    each rank makes this call and writes its share.

    Args:
        data: See `datasets.open_images`.
        out: The store's folder.
        teacher: See `load_teacher`. Views have its channels, mean and std.
        recipe: Only what decides the views counts (`recipe.VIEW_SETTINGS`).
        epochs: How many the store is to have.
        k: Classes in a record.
        count: So many of the images only.
        seed: Of order and augmentation.
        img_size: Pixels of a side of the views; None: the teacher's own.
        teacher_checkpoint: See `load_teacher`.
        teacher_checkpoint_key: See `load_teacher`.
        batch: Views of each rank in one forward pass, even.
        amp: The teacher's precision, "none", "bf16" or "fp16".
        backend: See `deit_fast.accelerate`.
        workers: Processes that decode and augment.
        image_key: Column of a Hugging Face dataset.
        label_key: Column of a Hugging Face dataset.
        report: Gets a dict with "event": "begin" (with "bytes", what the store will take), "update"
            or "note", on rank 0 alone.

    Returns:
        "epochs", "records" (an epoch), "bytes" (of the whole store), "seconds" and "images_per_s"
        of this call (None where nothing was left to do), and "unreadable" (images that gave way to
        the next, by name, with the reason).

    Raises:
        ValueError: Something does not fit, a store of something else in `out` included.
        FileNotFoundError: Data or weights are missing.
        Damaged: A file is not as it was written.
        OSError: The disk has not the room.
        FloatingPointError: A probability is not finite.
        Interrupted: After SIGTERM or SIGINT.
    """
    for name, value, least in (("epochs", epochs, 1), ("workers", workers, 0), ("batch", batch, 2)):
        if value < least:
            raise ValueError(f"{name}: {value}, expected {least} or more")
    if batch % 2:
        raise ValueError(f"batch: {batch}, expected an even number, for views are mixed in pairs")
    if amp not in AMP:
        raise ValueError(f"amp: {amp!r}, expected one of {', '.join(AMP)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed}, expected 0 to 2**32 - 1")
    out = Path(out)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(Ranks.joined())
        images = open_images(data, "train", image_key=image_key, label_key=label_key)
        classes = len(images.classes)
        if classes > MOST_CLASSES:
            raise ValueError(f"data: {classes} classes, expected at most {MOST_CLASSES}")
        if not 1 <= k <= classes:
            raise ValueError(
                f"k: {k}, expected 1 to {classes}, which is how many classes there are"
            )
        model = load_teacher(
            teacher, classes, img_size, teacher_checkpoint, backend, teacher_checkpoint_key
        )
        config = view_config(model, img_size)
        images.mode = image_mode(config)
        chosen = np.arange(len(images))
        if count is not None:
            chosen = fraction(images, count, seed).indices
        views = Views(images, recipe, config)
        known = fingerprint(images)
        manifest = Manifest(
            teacher=teacher_identity(model), images=known,
            transform=describe_transform(recipe, config), sample=_sample(out, views, known, seed),
            classes=classes, k=k, records=len(chosen), batch=batch, seed=seed,
            world=ranks.world_size, amp=amp, epochs=epochs,
            notes={"teacher": str(teacher), "versions": versions()},
        )  # fmt: skip
        if ranks.is_main:
            stack.enter_context(run_folder.locked(out))
            _begin(out, manifest)
        ranks.barrier()  # nobody looks before it is there
        there = Manifest.read(out)
        require_same_store(out, there, manifest)  # each rank makes the same views
        signals = stack.enter_context(catch_signals())
        model.to(ranks.device)
        run = _WriteRun(out, manifest, model, views, chosen, ranks, workers, signals, report)
        for text in version_notes(there):
            run.report({"event": "note", "text": text})
        try:
            return run.write()
        except RuntimeError as error:  # of another rank, or a worker, that the signal ended
            if signals and not isinstance(error, Interrupted):
                raise Interrupted(signals[0], "its last whole block") from error
            raise


def _sample(out: Path, views: Views, known: dict, seed: int) -> dict:
    """Of the images that a store in `out` has its sample of: others may be readable by now."""
    indices = None
    if (out / MANIFEST).exists() and (there := Manifest.read(out)).images == known:
        indices = there.sample["images"]
    return views.sample(seed, indices)


def _begin(out: Path, manifest: Manifest) -> None:
    """Write the manifest, or see that the one that is there is of the same store."""
    if (out / MANIFEST).exists():
        there = Manifest.read(out)
        require_same_store(out, there, manifest)
        if there.epochs > manifest.epochs:
            raise ValueError(f"epochs: {manifest.epochs}, but {out} is to get {there.epochs}")
        manifest = replace(there, epochs=manifest.epochs)
    elif stray := sorted(out.glob("epoch-*")):
        raise ValueError(
            f"out: {out} has {stray[0].name} and no {MANIFEST}, expected another folder"
        )
    taken = sum(path.stat().st_size for path in out.glob("epoch-*"))
    need, free = manifest.epochs * manifest.epoch_bytes - taken, shutil.disk_usage(out).free
    if need > free:
        raise OSError(f"out: {out} has {free:,} bytes free, the store needs {need:,} more")
    manifest.write(out)


def order_of(manifest: Manifest, chosen: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw (indices of images, seeds) of an epoch's records, both int32."""
    draw = np.random.default_rng((manifest.seed, epoch))
    order = draw.permutation(chosen).astype(np.int32)
    return order, draw.integers(2**31, size=len(order)).astype(np.int32)


class _Blocks:
    """A batch sampler over the rest of an epoch: lists of (index, seed)."""

    def __init__(self, batch: int):
        self.batch = batch
        self.rest: list[tuple[int, int]] = []

    def begin(self, rest: list[tuple[int, int]]) -> None:
        self.rest = rest

    def __len__(self) -> int:
        return -(-len(self.rest) // self.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in range(0, len(self.rest), self.batch):
            yield self.rest[i : i + self.batch]


class _WriteRun:
    """One rank's part of a call of `write`."""

    def __init__(
        self, out: Path, manifest: Manifest, model: nn.Module, views: Views, chosen: np.ndarray,
        ranks: Ranks, workers: int, signals: list[int], report: Report,
    ):  # fmt: skip
        self.out, self.manifest, self.model, self.chosen = out, manifest, model, chosen
        self.ranks, self.signals = ranks, signals
        self.report = report if ranks.is_main else lambda event: None
        self.blocks = _Blocks(manifest.batch)
        self.loader = augment.loader(views, self.blocks, workers, views.collate)
        self.unreadable: dict[str, str] = {}
        self.cuts: list[str] = []
        self.written, self.seconds = 0, 0.0
        self.share = manifest.share(ranks.rank)

    def write(self) -> dict:
        manifest = self.manifest
        total = manifest.epochs * manifest.epoch_bytes
        self.report({
            "event": "begin", "epochs": manifest.epochs, "records": manifest.records,
            "rank_records": self.share[1], "bytes": total, "world_size": manifest.world,
        })  # fmt: skip
        for epoch in range(manifest.epochs):
            self._write_epoch(epoch)
            # in step: a rank that is far ahead would wait longer at the end than it may
            for unreadable, cuts in self.ranks.all_gather((self.unreadable, self.cuts)):
                self._note_unreadable(list(unreadable.items()))
                self._note_cuts(cuts)
        written, seconds = self.ranks.all_reduce(self.written, self.seconds)
        store = Store(self.out)
        size = sum(path.stat().st_size for path in self.out.glob("epoch-*.records"))
        for epoch in range(manifest.epochs):
            store.epoch(epoch)  # every file is there and as long as it should be
        return {
            "epochs": manifest.epochs, "records": manifest.records, "bytes": size,
            "seconds": seconds / manifest.world,
            "images_per_s": manifest.world * written / seconds if written else None,
            "unreadable": self.unreadable,
        }  # fmt: skip

    def _write_epoch(self, epoch: int) -> None:
        manifest, began = self.manifest, time.perf_counter()
        writer = Writer(self.out, manifest, epoch, self.ranks.rank)
        with contextlib.closing(writer):
            if writer.cut is not None:
                self._note_cuts([f"{writer.cut}: goes on behind its first {writer.done} records"])
            if writer.complete:
                return
            order, seeds = order_of(manifest, self.chosen, epoch)
            first, count = self.share
            order, seeds = order[first : first + count], seeds[first : first + count]
            writer.require(order, seeds)
            rest = zip(order[writer.done :].tolist(), seeds[writer.done :].tolist(), strict=True)
            self.blocks.begin(list(rest))
            for batch, used, unreadable in self.loader:
                images = require_readable(batch, unreadable)
                records = np.empty(len(images), manifest.record)
                part = slice(writer.done, writer.done + len(images))
                records["index"], records["seed"] = used, seeds[part]  # not what gave way
                records["classes"], records["probs"] = top_k_probabilities(
                    self.model, images, manifest.amp, manifest.k
                )
                writer.add(records)
                self._note_unreadable(unreadable)
                self.written += len(records)
                self.report({"event": "update", "epoch": epoch, "written": writer.done})
                if self.signals:
                    raise Interrupted(
                        self.signals[0], f"epoch {epoch + 1} of {manifest.epochs}, record "
                        f"{first + writer.done}",
                    )  # fmt: skip
            writer.seal()
        self.seconds += time.perf_counter() - began

    def _note_cuts(self, cuts: list[str]) -> None:
        for text in cuts:
            if text not in self.cuts:
                self.cuts.append(text)
                self.report({"event": "note", "text": text})

    def _note_unreadable(self, unreadable: Unreadables) -> None:
        for name, reason in unreadable:
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self.report({"event": "note", "text": f"unreadable, left out: {name}: {reason}"})
