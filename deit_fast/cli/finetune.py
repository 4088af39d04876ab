"""What `deit-fast finetune` does; its options are in parsers/finetune.py."""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from deit_fast.distill.interrupt import Interrupted
from deit_fast.distill.recipe import Recipe
from deit_fast.distill.student import Settings
from deit_fast.finetune import job, plan
from deit_fast.models import NANO_FOLDER

from . import _data, _training, train

AUTO = "auto"
START = {"cpu": "deit_tiny_distilled", "cuda": "deit_small_distilled"}


def run(args: argparse.Namespace) -> int:
    """Plan, train and report; returns the exit code."""
    if args.runs < 1:
        raise ValueError(f"--runs: {args.runs}, expected 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _fill(args, device)
    if args.recipe != AUTO:
        for option, given in (("--dry-run", args.dry_run), ("--time", args.time)):
            if given:
                raise ValueError(f"{option}: with --recipe {args.recipe}, expected --recipe auto")
    teacher_auto = args.teacher == AUTO
    if teacher_auto:
        args.teacher = None
    settings = train.settings_of(args)
    try:
        if teacher_auto:
            settings = _with_teacher(args, settings, device)
        recipe = _recipe(args, settings, args.out, device)
        if args.dry_run:
            return 0
        result = _train(args, settings, recipe)
    except Interrupted as stopped:
        return 128 + stopped.number
    train.print_result(args.out, result)
    return 0


def _fill(args, device):
    """Options that were not given."""
    if args.out is None:
        args.out = Path("runs", Path(args.data).resolve().name)
    if args.start is None:
        args.start = "pretrained"
    if args.start == "pretrained" and args.model is None:
        args.model = START[device]
    if args.start == "nano":
        args.start = str(NANO_FOLDER)


def _recipe(args: argparse.Namespace, settings: Settings, out: Path, device: str) -> Recipe:
    """The recipe that is asked for, or a planned one, which is printed."""
    if args.recipe != AUTO:
        return _training.recipe_of(args)
    given = _training.given_settings(args)
    asked = {"given": given, "time": args.time} | dataclasses.asdict(settings)
    is_main, notes = _training.main_console()
    seconds = None
    if args.time is not None:
        seconds = job.seconds_of(args.time)
        kept = None if args.restart else job.kept_epochs(out, asked)
        if kept is not None:
            seconds, given = None, {"epochs": kept, **given}
    planned = job.make_plan(settings, given, seconds=seconds, device=device)
    if is_main:
        _show(settings, planned)
        if not args.dry_run:
            job.write_plan(out, planned, asked)
    return planned.plan.recipe


def _show(settings, planned):
    what = settings.model or settings.start
    _data.show(
        f"{what}: {planned.images:,} images to train on, {planned.validation:,} to evaluate on, "
        f"{len(planned.classes)} classes", ("setting", "value", "why"), (),
        plan.as_rows(planned.plan),
    )  # fmt: skip
    for text in planned.plan.advice:
        print(f"advice: {text}")
    print(f"expected: {planned.minutes:,.1f} minutes, by one timed step; decoding comes on top")
    sys.stdout.flush()


def _with_teacher(args: argparse.Namespace, settings: Settings, device: str) -> Settings:
    """Settings with the larger model as teacher, which is fine-tuned first."""
    teaching = job.teacher_settings(settings)
    out = args.out / job.TEACHER
    print(f"teacher: {teaching.model}, in {out}")
    recipe = _recipe(args, teaching, out, device)
    if not args.dry_run:
        train.print_result(out, train.trained(args, teaching, recipe, out))
    distill = args.distill or "hard"
    return dataclasses.replace(settings, teacher=str(out / "model"), distill=distill)


def _train(args, settings, recipe):
    if args.runs == 1:
        return train.trained(args, settings, recipe, args.out)

    def one(out: Path, seed: int) -> dict:
        result = train.trained(args, dataclasses.replace(settings, seed=seed), recipe, out)
        train.print_result(out, result)
        return result

    seeds = list(range(settings.seed, settings.seed + args.runs))
    return job.several(args.out, seeds, one)
