"""What commands share that run a model over images: where it runs, the images, tables."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from deit_fast.distill.datasets import ImageSet, has_split, open_images
from deit_fast.engine import data_config
from deit_fast.images import Decoder

SHOWN = 10  # unreadable images that are named
SHIPPED = Path(__file__).parents[1] / "data"  # images that come with deit_fast


class Setting(NamedTuple):
    """Where and how a model runs."""

    device: str
    dtype: str
    batch: int
    workers: int


def setting(args: Namespace) -> Setting:
    """Fill in the defaults of the options of `parsers._options.add_running`.

    Raises:
        ValueError: A number is too small.
    """
    cuda = torch.cuda.is_available()
    workers = args.workers
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), 16)
    batch = (256 if cuda else 32) if args.batch is None else args.batch
    for name, value, least in (("batch", batch, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"--{name}: {value}, expected {least} or more")
    dtype = args.dtype or ("fp16" if cuda else "fp32")
    return Setting("cuda" if cuda else "cpu", dtype, batch, workers)


def photographs() -> list[Path]:
    """Return the photographs that come with deit_fast."""
    return sorted(path for path in SHIPPED.iterdir() if path.suffix == ".jpg")


def images_for(model: nn.Module, args: Namespace) -> ImageSet:
    """Open `args.data`, as gray or colour as the model expects it."""
    if args.split is None and has_split(
        args.data, "validation", image_key=args.image_key, label_key=args.label_key
    ):
        args.split = "validation"
    return open_images(
        args.data, args.split, mode=Decoder(data_config(model)).mode, image_key=args.image_key,
        label_key=args.label_key,
    )  # fmt: skip


@contextmanager
def progress(total: int, what: str = "") -> Iterator[Callable[..., None]]:
    """Yield a function that is told how many of `total` images are done; drawn on stderr.

    Where the total becomes known later, the function takes it as its second argument.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda done, total=total: bars.update(bar, completed=done, total=total)


def show(title: str, left: tuple, right: tuple, rows: list) -> None:
    """Print a table on stdout, as wide as it has to be: a number cut short is no number.

    Args:
        title: Printed above it.
        left: Headings of the columns of words.
        right: Headings of the columns of numbers, which are aligned to the right.
        rows: Cells, printed as they are.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in left:
        table.add_column(Text(heading), no_wrap=True)
    for heading in right:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    wide = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    print(title)
    console.print(table)


def report_skipped(skipped: list[tuple[str, str]], what: str = "skipped") -> int:
    """Name unreadable images on stderr; returns the exit code."""
    for name, reason in skipped[:SHOWN]:
        print(f"{name}: {reason}", file=sys.stderr)
    if len(skipped) > SHOWN:
        print(f"and {len(skipped) - SHOWN:,} more", file=sys.stderr)
    if skipped:
        print(f"{what}: {len(skipped):,} unreadable images", file=sys.stderr)
    return 1 if skipped else 0
