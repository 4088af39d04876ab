"""What `deit-fast distill-store` does; its options are in parsers/distill_store.py."""

import argparse
from dataclasses import asdict

from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from deit_fast.distill import store
from deit_fast.distill.interrupt import Interrupted

from . import _json, _training, train


def run(args: argparse.Namespace) -> int:
    """Run the action; returns the exit code."""
    return _ACTIONS[args.action](args)


def _write(args: argparse.Namespace) -> int:
    is_main, console = _training.main_console()
    with _Progress(console) as display:
        try:
            written = store.write(
                args.data, args.store, args.teacher, _training.recipe_of(args),
                epochs=args.epochs, k=args.k, count=args.count, seed=args.seed,
                img_size=args.img_size,
                teacher_checkpoint=args.teacher_checkpoint,
                teacher_checkpoint_key=args.teacher_checkpoint_key, batch=args.batch,
                amp=args.amp or _training.precision(), backend=args.backend,
                workers=_training.workers_of(args), image_key=args.image_key,
                label_key=args.label_key, report=display,
            )  # fmt: skip
        except Interrupted as stopped:
            console.print(f"stopped at {stopped}; the same command goes on", soft_wrap=True)
            return 128 + stopped.number
    if is_main:
        speed = written["images_per_s"]
        speed = "all of it was there" if speed is None else f"{speed:,.0f} images/s"
        print(f"{args.store}: {written['epochs']} epochs of {written['records']:,} records, "
              f"{_size(written['bytes'])}, {speed}")  # fmt: skip
        if written["unreadable"]:
            print(f"unreadable images, that gave way to the next: {len(written['unreadable'])}")
    return 0


class _Progress(_training.Display):
    """Progress of writing: the size first."""

    def __init__(self, console: Console):
        super().__init__(console, TextColumn("left"), TimeRemainingColumn())
        self.rank_records = 0

    def __call__(self, event: dict) -> None:
        if event["event"] == "begin":
            self.rank_records, self.epochs = event["rank_records"], event["epochs"]
            self.say(
                f"{event['epochs']} epochs of {event['records']:,} records: the store will take "
                f"{_size(event['bytes'])}"
            )
            total = self.epochs * self.rank_records
            self.task = self.progress.add_task("", total=total, epoch=f"1/{self.epochs}")
        elif event["event"] == "update":
            self.progress.update(
                self.task, completed=event["epoch"] * self.rank_records + event["written"],
                epoch=f"{event['epoch'] + 1}/{self.epochs}",
            )  # fmt: skip
        else:
            self.say(event["text"])


def _check(args: argparse.Namespace) -> int:
    console = Console(stderr=True)
    with _json.output(args.json) as write:
        found = store.check(
            args.data, args.store, args.teacher, samples=args.samples,
            seed=args.seed, teacher_checkpoint=args.teacher_checkpoint,
            teacher_checkpoint_key=args.teacher_checkpoint_key, amp=args.amp,
            backend=args.backend, image_key=args.image_key, label_key=args.label_key,
            report=lambda event: console.print(event["text"], soft_wrap=True, markup=False),
        )  # fmt: skip
        _show_check(found)
        write(found)
    return 0


def _show_check(found: dict) -> None:
    print(f"{found['records']:,} records: mean absolute difference of the probabilities "
          f"{found['mean_difference']:.2e}, different indices "
          f"{100 * found['different_indices']:.2f}%")  # fmt: skip


def _info(args: argparse.Namespace) -> int:
    with _json.output(args.json) as write:
        found = store.Store(args.store)
        every = range(found.manifest.epochs)
        damage = {i: why for i in every if (why := found.damage(i)) is not None}
        _show_info(found, damage)
        size = found.manifest.epochs * found.manifest.epoch_bytes
        write(
            {"key": found.manifest.key, "whole": not damage, "bytes": size}
            | {"damaged": {epoch: str(why) for epoch, why in damage.items()}}
            | asdict(found.manifest)
        )
    return 1 if damage else 0


def _show_info(found: store.Store, damage: dict[int, store.Damaged]) -> None:
    manifest = found.manifest
    transform = " ".join(f"{name}={value}" for name, value in manifest.transform.items())
    known = {
        "teacher": f"{manifest.notes['teacher']} ({manifest.teacher['architecture']}, weights "
        f"{manifest.teacher['weights']}, amp {manifest.amp})",
        "images": f"{manifest.images['count']:,} of {manifest.classes:,} classes, "
        f"{manifest.records:,} an epoch",
        "transform": transform,
        "records": f"K = {manifest.k}, {manifest.record.itemsize} bytes, by {manifest.world} "
        f"ranks in batches of {manifest.batch}, seed {manifest.seed}",
        "size": f"{manifest.epochs} epochs, {_size(manifest.epochs * manifest.epoch_bytes)}",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest.notes["versions"].items()),
        "key": manifest.key,
    }
    for name, value in known.items():
        print(f"{name:<9} {value}")
    for epoch, why in damage.items():
        print(f"epoch {epoch}: {why}")
    print(f"{manifest.epochs - len(damage)} of {manifest.epochs} epochs are whole")


def _size(count: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:,} bytes"


_ACTIONS = {"write": _write, "check": _check, "train": train.run, "info": _info}
