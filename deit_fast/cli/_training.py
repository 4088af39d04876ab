"""What commands that train or write a soft-label store share: recipe, defaults, progress."""

import argparse
import dataclasses
import os

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn

from deit_fast.distill import recipe as recipes


def recipe_of(args: argparse.Namespace, given: dict | None = None) -> recipes.Recipe:
    """Load the recipe that the options of `parsers._options.add_recipe` describe.

    Args:
        args: With those options.
        given: Settings where no option says otherwise.
    """
    return recipes.load(args.recipe, **(given or {}) | given_settings(args))


def given_settings(args: argparse.Namespace) -> dict:
    """The settings of a recipe for which an option was given."""
    return {
        setting.name: value
        for setting in dataclasses.fields(recipes.Recipe)
        if (value := getattr(args, f"recipe_{setting.name}", None)) is not None
    }


def workers_of(args: argparse.Namespace) -> int:
    """Choose --workers, or one a core of this rank's share."""
    if args.workers is not None:
        return args.workers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(len(os.sched_getaffinity(0)) // ranks, 16)
    return workers if workers > 1 else 0  # a single core has nothing to gain


def precision() -> str:
    """Choose --amp: bf16 where a GPU computes in it, fp16 on older ones, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return "none"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def main_console() -> tuple[bool, Console]:
    """Whether this is rank 0, and a console on stderr that is quiet on the other ranks."""
    is_main = int(os.environ.get("RANK", 0)) == 0
    return is_main, Console(stderr=True, quiet=not is_main)


class Display:
    """Lines, and on a terminal a progress bar.

    Args:
        console: Where they go.
        *columns: Of the bar, behind the epoch.
    """

    def __init__(self, console: Console, *columns: ProgressColumn):
        self.console = console
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"), BarColumn(), *columns,
            console=console, transient=True, disable=console.quiet or not console.is_terminal,
        )  # fmt: skip
        self.task, self.epochs = TaskID(0), 0  # until the run begins

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)
