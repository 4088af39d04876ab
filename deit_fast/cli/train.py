"""What `deit-fast train` does; its options are in parsers/train.py."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deit_fast.distill.interrupt import Interrupted
from deit_fast.distill.recipe import Recipe
from deit_fast.distill.store.compatibility import recipe_settings
from deit_fast.distill.store.reader import Store
from deit_fast.distill.student import Settings
from deit_fast.distill.train import train

from . import _training


def run(args: argparse.Namespace) -> int:
    """Train, and print the result; returns the exit code."""
    given = {} if args.store is None else recipe_settings(Store(args.store))
    recipe = _training.recipe_of(args, given)
    try:
        result = trained(args, settings_of(args), recipe, args.out)
    except Interrupted as stopped:
        return 128 + stopped.number
    print_result(args.out, result)
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the command's options describe."""
    named = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    return Settings(**named | {
        "model_args": _arguments(args.model_args), "amp": args.amp or _training.precision(),
        "distill": args.distill or ("none" if args.teacher is None else "hard"),
        "mean": args.mean and tuple(args.mean), "std": args.std and tuple(args.std),
    })  # fmt: skip


def trained(args: argparse.Namespace, settings: Settings, recipe: Recipe, out: Path) -> dict:
    """Train into `out`, with progress on standard error; returns the content of result.json.

    Raises:
        Interrupted: After a signal, which a line says.
    """
    _, notes = _training.main_console()
    with _Progress(notes) as display:
        try:
            return train(
                settings, recipe, out, workers=_training.workers_of(args),
                save_every=args.save_every, eval_every=args.eval_every, restart=args.restart,
                tensorboard=args.tensorboard, report=display,
            )  # fmt: skip
        except Interrupted as stopped:
            notes.print(f"stopped, saved at {stopped}; the same command goes on", soft_wrap=True)
            raise


def print_result(out: Path, result: dict) -> None:
    """Print a run's result, on rank 0 alone."""
    is_main, _ = _training.main_console()
    if is_main:
        print(f"{out}: {top1(result)}, {result['images_per_s']:,.0f} images/s in training")
        if result["unreadable"]:
            print(f"unreadable images: {result['unreadable']}, in {out / 'unreadable.csv'}")


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
            scores = f", {top1(event['scores'])}" if "scores" in event else ""
            ema = f", averaged weights {top1(event['ema'])}" if "ema" in event else ""
            self.say(
                f"epoch {event['epoch']}/{self.epochs}: loss {event['loss']:.4f}{scores}{ema}, "
                f"{event['images_per_s']:,.0f} images/s"
            )
        else:
            self.say(event["text"])


def top1(found: dict) -> str:
    """Top-1 of each head in one line."""
    best = found["top1"]
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
