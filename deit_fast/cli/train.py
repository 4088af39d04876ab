"""Train a model, distilled from a teacher or not; the same command again goes on where it stopped.

Examples:
  deit-fast train imagenet/ --model deit_small_distilled --teacher regnety_160 --out small
  torchrun --nproc-per-node 8 -m deit_fast train imagenet/ --model deit_base --amp bf16 --out base
  deit-fast train shards/ --model deit_tiny --recipe vit --batch 1024 --accum 4 --out ti
  deit-fast train photos/ --model deit_small --repeated-aug 1 --auto-augment original --out ablation
  deit-fast train fashion-mnist/ --model deit_nano_fashion --crop pad --crop-pct 1 --out nano
  deit-fast train imagenet/ --model tiny_vit_5m_224 --store labels/ --out tiny

DATA is a folder with train and val in it (folders of classes, .tar shards, .parquet files), what
datasets.save_to_disk wrote, or MNIST's idx files. Every setting of the recipe is an option, so each
ablation of the paper's Table 8 is one: --opt sgd, --auto-augment none (or original), --mixup 0,
--cutmix 0, --mixup-prob 0, --erasing 0, --drop-path 0, --repeated-aug 1, --drop 0.1, --ema 0.99996.

Ctrl-C and SIGTERM save and stop. Exit code: 0; 2 for an error; 130 and 143 after those signals.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deit_fast.distill.interrupt import Interrupted
from deit_fast.distill.store.compatibility import recipe_settings
from deit_fast.distill.store.reader import Store
from deit_fast.distill.student import AMP, Settings
from deit_fast.distill.train import train
from deit_fast.kernels.distillation_loss import DISTILLATIONS

from . import _data, _models, _training


def add_arguments(parser: argparse.ArgumentParser, from_store: bool = False) -> None:
    """Add the command's options.

    Args:
        parser: Gets them.
        from_store: The store is an argument, and no teacher can be given.
    """
    parser.add_argument("data", metavar="DATA")
    if from_store:
        parser.add_argument("store", metavar="STORE")
        parser.set_defaults(distill="none", teacher=None)
        parser.set_defaults(teacher_checkpoint=None, teacher_checkpoint_key=None)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of this run alone")
    parser.add_argument("--model", metavar="NAME", help="one of ours or any timm name")
    parser.add_argument(
        "--model-args", nargs="+", default=[], metavar="KEY=VALUE",
        help="timm's keyword arguments, such as embed_dim=96 depth=6",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="start", metavar="WEIGHTS",
        help="start from a folder of weights (another run's DIR/model), a checkpoint file, or "
        "'pretrained': timm's from the hub",
    )  # fmt: skip
    _models.add_key(parser, "--from-key", dest="start_key")
    _data.add_keys(parser)
    parser.add_argument("--img-size", type=int, metavar="PX", help="(default: the model's own)")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X",
            help="of each channel, pixels from 0 to 1 (default: the model's own)",
        )  # fmt: skip
    if not from_store:
        _add_teacher(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--seed", type=int, default=0, metavar="N")
    run.add_argument("--count", type=int, metavar="N", help="train on so many images only")
    run.add_argument(
        "--accum", type=int, default=1, metavar="N", help="parts a batch is computed in"
    )
    run.add_argument(
        "--amp",
        choices=AMP,
        help="mixed precision (default: bf16, on a GPU without it fp16, on a CPU none)",
    )
    run.add_argument("--compile", metavar="MODE", help="torch.compile's, such as reduce-overhead")
    run.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    run.add_argument("--workers", type=int, metavar="N", help="(default: one a CPU core up to 16)")
    run.add_argument(
        "--save-every", type=int, default=1000, metavar="UPDATES",
        help="besides at the end of each epoch (default: %(default)s)",
    )  # fmt: skip
    run.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS")
    run.add_argument("--restart", action="store_true", help="throw away what is in DIR")
    run.add_argument("--tensorboard", action="store_true", help="log for it too")
    _training.add_recipe(parser)


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    teacher = parser.add_argument_group("distillation")
    teacher.add_argument(
        "--distill", choices=DISTILLATIONS,
        help="through the distillation token if the model has one, else the class token (default: "
        "hard with a teacher, else none)",
    )  # fmt: skip
    teacher.add_argument(
        "--teacher", metavar="MODEL", help="a name, or a folder (another run's DIR/model)"
    )
    teacher.add_argument("--teacher-checkpoint", metavar="PATH", help="(default: from the hub)")
    _models.add_key(teacher, "--teacher-checkpoint-key")
    teacher.add_argument(
        "--store", metavar="DIR",
        help="learn from a soft-label store, see deit-fast distill-store, without a teacher",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train, and print the result; returns the exit code."""
    given = {} if args.store is None else recipe_settings(Store(args.store))
    recipe = _training.recipe_of(args, given)
    named = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**named | {
        "model_args": _arguments(args.model_args), "amp": args.amp or _training.precision(),
        "distill": args.distill or ("none" if args.teacher is None else "hard"),
        "mean": args.mean and tuple(args.mean), "std": args.std and tuple(args.std),
    })  # fmt: skip
    is_main, notes = _training.main_console()
    with _Progress(notes) as display:
        try:
            result = train(
                settings, recipe, args.out, workers=_training.workers_of(args),
                save_every=args.save_every, eval_every=args.eval_every, restart=args.restart,
                tensorboard=args.tensorboard, report=display,
            )  # fmt: skip
        except Interrupted as stopped:
            notes.print(f"stopped, saved at {stopped}; the same command goes on", soft_wrap=True)
            return 128 + stopped.number
    if is_main:
        print(f"{args.out}: {_scores(result)}, {result['images_per_s']:,.0f} images/s in training")
        if result["unreadable"]:
            print(f"unreadable images: {result['unreadable']}, in {args.out / 'unreadable.csv'}")
    return 0


class _Progress(_training.Display):
    """Progress of a run: a line an epoch."""

    def __init__(self, console: Console):
        super().__init__(
            console, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
        )  # fmt: skip
        self.updates = 0

    def __call__(self, event: dict) -> None:
        kind = event["event"]
        if kind == "begin":
            self.updates, self.epochs = event["updates"], event["epochs"]
            done = event["epoch"] * self.updates + event["update"]
            self.say(
                f"{event['images']} images to train on, {event['validation']} to evaluate on, "
                f"{self.updates} updates of {event['batch']} an epoch"
            )
            if event["teacher_top1"] is not None:
                self.say(f"teacher: top-1 {event['teacher_top1']:.2f}%")
            if done:
                self.say(f"goes on at epoch {event['epoch'] + 1}, update {event['update']}")
            self.task = self.progress.add_task(
                "", total=self.epochs * self.updates, completed=done, said="",
                epoch=f"{event['epoch'] + 1}/{self.epochs}",
            )  # fmt: skip
        elif kind == "update":
            self.progress.update(
                self.task, completed=event["epoch"] * self.updates + event["update"],
                epoch=f"{event['epoch'] + 1}/{self.epochs}",
                said=f"loss {event['loss']:.3f}  lr {event['lr']:.2e}  "
                f"{event['images_per_s']:,.0f} images/s",
            )  # fmt: skip
        elif kind == "epoch":
            scores = f", {_scores(event['scores'])}" if "scores" in event else ""
            ema = f", averaged weights {_scores(event['ema'])}" if "ema" in event else ""
            self.say(
                f"epoch {event['epoch']}/{self.epochs}: loss {event['loss']:.4f}{scores}{ema}, "
                f"{event['images_per_s']:,.0f} images/s"
            )
        else:
            self.say(event["text"])


def _scores(scores: dict) -> str:
    best = scores["top1"]
    return "top-1 " + ", ".join(f"{head} {percent:.2f}%" for head, percent in best.items())


def _arguments(pairs: list[str]) -> dict[str, Any]:
    """["depth=6"] -> {"depth": 6}; values are JSON, or else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"--model-args: {pair!r}, expected KEY=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
