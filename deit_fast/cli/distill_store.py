r"""Write a teacher's soft labels to a store once, then train students without it (TinyViT).

Examples:
  deit-fast distill-store write imagenet/ labels/ --teacher regnety_160 --img-size 224 --epochs 300
  torchrun --nproc-per-node 8 -m deit_fast distill-store write imagenet/ labels/ --epochs 300 \
      --teacher regnety_160 --img-size 224
  deit-fast distill-store check imagenet/ labels/ --teacher regnety_160
  deit-fast distill-store train imagenet/ labels/ --model tiny_vit_5m_224 --out tiny
  deit-fast distill-store info labels/

write stores, for each image and epoch, the seed of its augmentation and the K most probable
classes; the same command goes on where it stopped, with more --epochs it adds them. train is
deit-fast train --store STORE: its images are, bit for bit, those the teacher saw. check asks the
teacher again, on a sample. info reads every file and names what is damaged: delete such a file, and
write creates it anew.

Exit code: 0; 1 where info finds a store incomplete or damaged; 2 for an error; 130 and 143 after
Ctrl-C and SIGTERM.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from deit_fast.distill import store
from deit_fast.distill.interrupt import Interrupted
from deit_fast.distill.store.views import SETTINGS
from deit_fast.distill.student import AMP

from . import _data, _models, _training, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("write", "the teacher over every augmented image of every epoch"),
        ("check", "the teacher again, on a sample"),
        ("train", "a student, from the store alone"),
        ("info", "what is there, and whether it is whole"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        _ACTIONS[name][0](action)


def _add_write(parser: argparse.ArgumentParser) -> None:
    _add_teacher(parser)
    parser.add_argument("--epochs", type=int, required=True, metavar="N")
    parser.add_argument(
        "--k", type=int, default=10, metavar="K",
        help="classes a record; 100 for ImageNet-21k (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--img-size", type=int, metavar="PX", help="(default: the teacher's own)")
    parser.add_argument("--count", type=int, metavar="N", help="so many of the images only")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--batch", type=int, default=256, metavar="B",
        help="images of each rank in one forward pass (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--amp", choices=AMP,
        help="the teacher's precision (default: bf16, on a GPU without it fp16, on a CPU none)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="(default: one a CPU core)")
    _training.add_recipe(parser, SETTINGS)


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_teacher(parser)
    parser.add_argument(
        "--samples", type=int, default=1024, metavar="N",
        help="at least so many records, in whole batches (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="that draws them")
    parser.add_argument("--amp", choices=AMP, help="(default: the store's)")


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("store", metavar="STORE", type=Path)
    parser.add_argument(
        "--teacher", required=True, metavar="MODEL",
        help="a name, or a folder (OUT/model of deit-fast train)",
    )  # fmt: skip
    parser.add_argument("--teacher-checkpoint", metavar="PATH", help="(default: from the hub)")
    _models.add_key(parser, "--teacher-checkpoint-key")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    _data.add_keys(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser, from_store=True)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", type=Path)


def run(args: argparse.Namespace) -> int:
    """Run the action; returns the exit code."""
    return _ACTIONS[args.action][1](args)


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
    found = store.check(
        args.data, args.store, args.teacher, samples=args.samples,
        seed=args.seed, teacher_checkpoint=args.teacher_checkpoint,
        teacher_checkpoint_key=args.teacher_checkpoint_key, amp=args.amp,
        backend=args.backend, image_key=args.image_key, label_key=args.label_key,
        report=lambda event: console.print(event["text"], soft_wrap=True, markup=False),
    )  # fmt: skip
    print(f"{found['records']:,} records: mean absolute difference of the probabilities "
          f"{found['mean_difference']:.2e}, different indices "
          f"{100 * found['different_indices']:.2f}%")  # fmt: skip
    return 0


def _info(args: argparse.Namespace) -> int:
    found = store.Store(args.store)
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
    whole = 0
    for epoch in range(manifest.epochs):
        damage = found.damage(epoch)
        whole += damage is None
        if damage is not None:
            print(f"epoch {epoch}: {damage}")
    print(f"{whole} of {manifest.epochs} epochs are whole")
    return 0 if whole == manifest.epochs else 1


def _size(count: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:,} bytes"


_ACTIONS = {
    "write": (_add_write, _write), "check": (_add_check, _check),
    "train": (_add_train, train.run), "info": (_add_info, _info),
}  # fmt: skip
