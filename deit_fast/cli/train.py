"""What `deit-fast train` does; its options are in parsers/train.py."""

import argparse
import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deit_fast.distill.interrupt import Interrupted
from deit_fast.distill.store.compatibility import recipe_settings
from deit_fast.distill.store.reader import Store
from deit_fast.distill.student import Settings
from deit_fast.distill.train import train

from . import _training


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
        speed = f"{result['images_per_s']:,.0f} images/s in training"
        print(f"{args.out}: {_chosen(result)}{_scores(result)}, {speed}")
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


def _chosen(result: dict) -> str:
    """Which epoch the result is of, where it was chosen."""
    if "best" not in result:
        return ""
    early = ", stopped early" if result["stopped_early"] else ""
    return f"epoch {result['epoch']} of {result['epochs']}{early}, best {result['best']}: "


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
