"""What `deit-fast data` does; its options are in parsers/data.py."""

import argparse
from collections.abc import Callable
from typing import Any

from deit_fast.distill.datasets import sheet
from deit_fast.distill.datasets.survey import ODD, survey

from . import _data, _json, _training

CLASSES = 40  # that are listed; of more the smallest are
SHOWN = 10  # duplicates that are named


def run(args: argparse.Namespace) -> int:
    """Look at the data, and print what it is like; returns the exit code."""
    workers = _training.workers_of(args)
    if workers < 0:
        raise ValueError(f"--workers: {workers}, expected 0 or more")
    if args.sheet is not None:
        sheet.require_format(args.sheet)
    with _json.output(args.json) as write:
        return _run(args, workers, write)


def _run(args: argparse.Namespace, workers: int, write: Callable[[Any], None]) -> int:
    with _data.progress(0) as progress:
        found = survey(
            args.data, workers=workers, image_key=args.image_key, label_key=args.label_key,
            progress=lambda done, total: progress(done, total),
        )  # fmt: skip
    summary = found.summary()
    _show_counts(args.data, summary["splits"])
    _show_images(summary["splits"])
    _show_odd(found.odd())
    _show_duplicates(summary["duplicates"], len(found.splits))
    if args.sheet is not None:
        name, images = next(iter(found.splits.items()))
        sheet.write(sheet.contact_sheet(images), args.sheet)
        more = len(images.classes) - sheet.ROWS
        left_out = f", without the last {more} classes" if more > 0 else ""
        print(f"{args.sheet}: pictures of each class ({name}{left_out})")
    write({"data": args.data, **summary})
    damaged = _data.report_skipped(found.unreadable(), "damaged")
    return 1 if damaged or summary["across_splits"] else 0


def _show_counts(data: str, splits: dict[str, dict]) -> None:
    classes = list(next(iter(splits.values()))["classes"])
    rows = [(name, *(split["classes"][name] for split in splits.values())) for name in classes]
    title = f"{data}: images of {len(classes):,} classes"
    if len(rows) > CLASSES:
        rows = sorted(rows, key=lambda row: row[1])[:CLASSES]
        title += f"; the smallest {CLASSES}"
    shown = [(name, *(f"{count:,}" for count in counts)) for name, *counts in rows]
    shown.append(("all", *(f"{split['images']:,}" for split in splits.values())))
    shown.append(("largest / smallest", *(f"{s['imbalance']:.1f}" for s in splits.values())))
    _data.show(title, ("class",), tuple(splits), shown)


def _show_images(splits: dict[str, dict]) -> None:
    rows = []
    for name, split in splits.items():
        for side in ("width", "height"):
            if side in split:
                values = (f"{split[side][what]:,.0f}" for what in ("min", "median", "max"))
                rows.append((name, side, *values))
    if rows:
        _data.show("pixels", ("split", "side"), ("smallest", "median", "largest"), rows)
    for name, split in splits.items():
        modes = ", ".join(f"{mode} {count:,}" for mode, count in split["modes"].items())
        print(f"modes, {name}: {modes or 'none'}")


def _show_odd(odd: dict[str, list[str]]) -> None:
    for kind, names in odd.items():
        print(f"{kind}: {len(names):,} images, such as {names[0]} ({ODD[kind]})")


def _show_duplicates(groups: list[dict], splits: int) -> None:
    across = sum(group["across"] for group in groups)
    copies = sum(len(group["images"]) - 1 for group in groups)
    equal = sum(group["equal"] for group in groups)
    apart = sum(len(group["classes"]) > 1 for group in groups)
    print(
        f"duplicates: {copies:,} copies of {len(groups):,} pictures, of {equal:,} pixel for pixel"
    )
    if splits > 1:
        print(f"across splits: {across:,} pictures")
    if apart:
        print(f"in more than one class: {apart:,} pictures")
    bad = [group for group in groups if group["across"] or len(group["classes"]) > 1]
    for group in (bad or groups)[:SHOWN]:
        print("  " + " = ".join(name for _, name in group["images"][:4]))
    if len(bad or groups) > SHOWN:
        print(f"  and {len(bad or groups) - SHOWN:,} more (--json has all)")
