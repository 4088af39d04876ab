"""Writing a store: the teacher over every picture of every epoch."""

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from deit_fast.batch_inference import digest
from deit_fast.engine import data_config

from .. import augment, folder
from ..datasets import fraction, open_images
from ..processes import Group, Interrupted, signals
from ..recipe import Recipe
from ..student import AMP
from ..teacher import load_teacher
from .files import MANIFEST, Manifest, Store, Writer
from .pictures import Pictures, describe, identify, require_readable, versions

MOST_CLASSES = 2**16  # of uint16


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
    report: Callable[[dict], None] = lambda event: None,
) -> dict:
    """Store the `k` largest probabilities of `teacher` for each picture of `epochs` epochs in the
    folder `out`; the same call again goes on where it stopped, and one with more epochs adds them.

    data: see `datasets.open_images`. teacher, teacher_checkpoint and its key: see `load_teacher`;
    pictures have its channels, mean and std, and `img_size` pixels, its own for None. recipe: of it
    counts what makes the pictures (`pictures.SETTINGS`). count: so many of the images only. seed:
    of order and augmentation. batch: pictures of each process in one pass, even. amp: "none" |
    "bf16" | "fp16".
    report: gets a dict with "event": "begin" (with "bytes", what the store will take), "update" or
    "note", in the first process alone. Under torchrun each of its processes makes this call and
    writes its share.

    Returns "epochs", "records" (an epoch), "bytes" (of the whole store), "seconds" and
    "images_per_s" of this call (None where nothing was left to do), and "unreadable" (images that
    gave way to the next, by name, with the reason). Raises ValueError
    or FileNotFoundError for what does not fit, a store of something else in `out` included;
    `Damaged` for a file that is not as it was written; OSError where the disk has not the room;
    FloatingPointError for an answer that is not finite; `Interrupted` after SIGTERM or SIGINT.
    """
    for name, value, least in (("epochs", epochs, 1), ("workers", workers, 0), ("batch", batch, 2)):
        if value < least:
            raise ValueError(f"{name}: {value}, expected {least} or more")
    if batch % 2:
        raise ValueError(
            f"batch: {batch}, expected an even number, for pictures are mixed in pairs"
        )
    if amp not in AMP:
        raise ValueError(f"amp: {amp!r}, expected one of {', '.join(AMP)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed}, expected 0 to 2**32 - 1")
    out = Path(out)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(Group.joined())
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
        config = config_of(model, img_size)
        images.mode = {1: "L", 3: "RGB"}[config["input_size"][0]]
        chosen = np.arange(len(images))
        if count is not None:
            chosen = fraction(images, count, seed).indices
        pictures = Pictures(images, recipe, config)
        known = identify(images)
        manifest = Manifest(
            teacher=teacher_of(model), images=known,
            transform=describe(recipe, config), sample=_sample(out, pictures, known, seed),
            classes=classes, k=k, records=len(chosen), batch=batch, seed=seed, world=group.world,
            amp=amp, epochs=epochs, notes={"teacher": str(teacher), "versions": versions()},
        )  # fmt: skip
        if group.leads:
            stack.enter_context(folder.locked(out))
            _begin(out, manifest)
        group.gather(None)  # nobody looks before it is there
        there = Manifest.read(out)
        require(out, there, manifest)  # each process makes the same pictures
        came = stack.enter_context(signals())
        model.to(group.device)
        writing = _Writing(out, manifest, model, pictures, chosen, group, workers, came, report)
        for text in notes_on(there):
            writing.report({"event": "note", "text": text})
        try:
            return writing.go()
        except RuntimeError as error:  # of another process, or a worker, that the signal ended
            if came and not isinstance(error, Interrupted):
                raise Interrupted(came[0], "its last whole block") from error
            raise


def teacher_of(model) -> dict:
    return {"architecture": model.pretrained_cfg["architecture"], "weights": digest(model)}


def config_of(model, img_size: int | None) -> dict:
    """timm's data configuration for a teacher's pictures: square, of 1 or 3 channels."""
    config = data_config(model)
    channels, *size = config["input_size"]
    size = size if img_size is None else [img_size] * 2
    if channels not in (1, 3):
        raise ValueError(f"teacher: {channels} channels, expected 1 or 3")
    if size[0] != size[1]:
        raise ValueError(f"teacher: pictures of {size[0]} x {size[1]}, expected an img_size")
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            raise ValueError(f"teacher: {name} {config[name]} in its pretrained_cfg, expected one a "
                             f"channel: {channels}")  # fmt: skip
    return config | {"input_size": (channels, *size)}


def _sample(out, pictures, known, seed):
    """Of the images that a store in `out` has its sample of: others may be readable by now."""
    of = None
    if (out / MANIFEST).exists() and (there := Manifest.read(out)).images == known:
        of = there.sample["images"]
    return pictures.sample(seed, of)


def _begin(out, manifest):
    """Write the manifest, or see that the one that is there is of the same store."""
    if (out / MANIFEST).exists():
        there = Manifest.read(out)
        require(out, there, manifest)
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


def require(out: Path, there: Manifest, now: Manifest) -> None:
    """Raise ValueError, saying what differs, unless both are of one store."""
    if there.key == now.key:
        return
    differences = []
    for name in ("teacher", "images", "transform"):
        was, is_now = getattr(there, name), getattr(now, name)
        differences += [
            f"{name} {key} {was.get(key)!r}, now {value!r}"
            for key, value in is_now.items()
            if was.get(key) != value
        ]
    for name in ("k", "records", "batch", "seed", "world", "amp"):
        was, is_now = getattr(there, name), getattr(now, name)
        if was != is_now:
            differences.append(f"{name} {was!r}, now {is_now!r}")
    if not differences:
        raise other_pixels(out, there)
    raise ValueError(f"out: {out} is another store: {'; '.join(differences)}")


def other_pixels(out: Path, there: Manifest) -> ValueError:
    """For pictures that come out differently though everything that makes them is said to be the
    same."""
    why = "; ".join(f"{name} {was}, now {now}" for name, was, now in moved(there))
    why = why or "versions are the same; other images of the same names, or another processor?"
    return ValueError(
        f"store: {out}: pictures made here are not, bit for bit, those its teacher saw ({why})"
    )


def moved(manifest: Manifest) -> list[tuple[str, str, str]]:
    """(package, its version when the store was begun, now) where these differ."""
    now, was = versions(), manifest.notes["versions"]
    return [(name, was.get(name), now[name]) for name in now if was.get(name) != now[name]]


def notes_on(manifest: Manifest) -> list[str]:
    """What to say of versions that are not those of a store, where the pictures are its own."""
    return [
        f"store: written with {name} {was}, now {now}; sample pictures are the same"
        for name, was, now in moved(manifest)
    ]


def order_of(manifest: Manifest, chosen: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices of images, seeds) of an epoch's records, both int32."""
    draw = np.random.default_rng((manifest.seed, epoch))
    order = draw.permutation(chosen).astype(np.int32)
    return order, draw.integers(2**31, size=len(order)).astype(np.int32)


def answer(model, images: torch.Tensor, amp: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(classes uint16, probabilities fp16), both (B, k), descending, of a batch on any device.
    Raises FloatingPointError."""
    images = images.to(next(model.parameters()).device, non_blocking=True)
    dtype = AMP[amp]
    with (
        torch.inference_mode(),
        torch.autocast(images.device.type, dtype, enabled=dtype is not None),
    ):
        probs, classes = model(images).float().softmax(1).topk(k)
    probs, classes = probs.cpu().numpy(), classes.cpu().numpy()
    if not np.isfinite(probs).all():
        raise FloatingPointError("teacher: its answer is not finite, expected another amp")
    return classes.astype(np.uint16), probs.astype(np.float16)


class _Blocks:
    """A batch sampler over what is left of an epoch: lists of (index, seed)."""

    def __init__(self, batch):
        self.batch, self.left = batch, []

    def begin(self, left):
        self.left = left

    def __len__(self):
        return -(-len(self.left) // self.batch)

    def __iter__(self):
        for i in range(0, len(self.left), self.batch):
            yield self.left[i : i + self.batch]


class _Writing:
    """One process's part."""

    def __init__(self, out, manifest, model, pictures, chosen, group, workers, signals, report):
        self.out, self.manifest, self.model, self.chosen = out, manifest, model, chosen
        self.group, self.signals = group, signals
        self.report = report if group.leads else lambda event: None
        self.blocks = _Blocks(manifest.batch)
        self.loader = augment.loader(pictures, self.blocks, workers, pictures.collate)
        self.unreadable, self.cuts, self.written, self.seconds = {}, [], 0, 0.0
        self.share = manifest.share(group.rank)

    def go(self):
        manifest = self.manifest
        total = manifest.epochs * manifest.epoch_bytes
        self.report({
            "event": "begin", "epochs": manifest.epochs, "records": manifest.records,
            "mine": self.share[1], "bytes": total, "processes": manifest.world,
        })  # fmt: skip
        for epoch in range(manifest.epochs):
            self._epoch(epoch)
            # in step: a process that is far ahead would wait longer at the end than it may
            for unreadable, cuts in self.group.gather((self.unreadable, self.cuts)):
                self._note(unreadable.items())
                self._tell(cuts)
        written, seconds = self.group.sum(self.written, self.seconds)
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

    def _epoch(self, epoch):
        manifest, began = self.manifest, time.perf_counter()
        writer = Writer(self.out, manifest, epoch, self.group.rank)
        with contextlib.closing(writer):
            if writer.cut is not None:
                self._tell([f"{writer.cut}: goes on behind its first {writer.done} records"])
            if writer.complete:
                return
            order, seeds = order_of(manifest, self.chosen, epoch)
            first, count = self.share
            order, seeds = order[first : first + count], seeds[first : first + count]
            writer.require(order, seeds)
            rest = zip(order[writer.done :].tolist(), seeds[writer.done :].tolist(), strict=True)
            self.blocks.begin(list(rest))
            for images, used, unreadable in self.loader:
                require_readable(images, unreadable)
                records = np.empty(len(images), manifest.record)
                part = slice(writer.done, writer.done + len(images))
                records["index"], records["seed"] = used, seeds[part]  # not what gave way
                records["classes"], records["probs"] = answer(
                    self.model, images, manifest.amp, manifest.k
                )
                writer.add(records)
                self._note(unreadable)
                self.written += len(records)
                self.report({"event": "update", "epoch": epoch, "written": writer.done})
                if self.signals:
                    raise Interrupted(
                        self.signals[0], f"epoch {epoch + 1} of {manifest.epochs}, record "
                        f"{first + writer.done}",
                    )  # fmt: skip
            writer.seal()
        self.seconds += time.perf_counter() - began

    def _tell(self, cuts):
        for text in cuts:
            if text not in self.cuts:
                self.cuts.append(text)
                self.report({"event": "note", "text": text})

    def _note(self, unreadable):
        for name, reason in unreadable:
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self.report({"event": "note", "text": f"unreadable, left out: {name}: {reason}"})
