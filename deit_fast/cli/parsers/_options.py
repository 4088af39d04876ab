"""Options that commands share: which model, which images, how it runs, what it writes."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, cast

from deit_fast import _names
from deit_fast._argparse import Parser
from deit_fast.distill import recipe as recipes

STDOUT = Path("-")  # as what --json takes
NAME = "one of ours, any timm name, or a folder from save_pretrained"


def add_weights(parser: Parser, heads: bool = True) -> None:
    """Add the options that say which weights a model gets.

    Args:
        parser: The command's.
        heads: Whether to add --heads.
    """
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--checkpoint", type=Path, metavar="PATH",
        help=".pth, .safetensors, or what a trainer saved; no code in it is run",
    )  # fmt: skip
    add_key(group, "--checkpoint-key")
    group.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction,
        help="from the hub (default without --checkpoint); --no: random",
    )  # fmt: skip
    if heads:
        group.add_argument(
            "--heads", choices=_names.HEADS, metavar="HEADS",
            help=f"of a distilled model: {', '.join(_names.HEADS)}",
        )  # fmt: skip
    else:
        parser.set_defaults(heads=None)
    add_img_size(group)


def add_img_size(parser: argparse._ActionsContainer, whose: str = "the model's own") -> None:
    """Add --img-size."""
    parser.add_argument("--img-size", type=int, metavar="PX", help=f"(default: {whose})")


def add_key(parser: argparse._ActionsContainer, option: str, **options: Any) -> None:
    """Add an option for the entry of a checkpoint.

    Args:
        parser: The command's, or a group of it.
        option: Its name.
        **options: Of `add_argument`.
    """
    what = "which entry of it, such as model_ema or teacher"
    parser.add_argument(option, metavar="KEY", help=what, **options)


def add_images(parser: Parser) -> None:
    """Add DATA, --split and the keys."""
    parser.add_argument(
        "data", metavar="DATA",
        help="a folder of classes, a table, .tar files, a Hugging Face dataset, or IDX files",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "validation"), metavar="SPLIT",
        help="train or validation (default: validation if DATA has it, else all)",
    )  # fmt: skip
    add_image_keys(parser)


def add_image_keys(parser: argparse._ActionsContainer) -> None:
    """Add --image-key and --label-key."""
    for key in ("image", "label"):
        parser.add_argument(
            f"--{key}-key", default=key, metavar="COLUMN",
            help="of a table or a Hugging Face dataset (default: %(default)s)",
        )  # fmt: skip


def add_running(parser: Parser, but: str = "") -> None:
    """Add --batch, --workers and --dtype; `but` is appended to the default of --workers."""
    group = parser.add_argument_group("how it runs")
    group.add_argument("--batch", type=int, metavar="B", help="(default: 256; 32 on a CPU)")
    group.add_argument(
        "--workers", type=int, metavar="N",
        help=f"processes that decode (default: one a CPU core up to 16{but})",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=_names.DTYPES, metavar="DTYPE",
        help="to compute in: fp32, fp16 or bf16 (default: fp16; fp32 on a CPU)",
    )  # fmt: skip


def add_training_workers(parser: argparse._ActionsContainer) -> None:
    """Add --workers of a rank."""
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode (default: one a CPU core)"
    )


def add_amp(parser: argparse._ActionsContainer, what: str) -> None:
    """Add --amp."""
    parser.add_argument(
        "--amp", choices=_names.AMP, metavar="DTYPE", help=f"none, bf16 or fp16 {what}"
    )


def add_backend(parser: argparse._ActionsContainer) -> None:
    """Add --backend of training."""
    parser.add_argument(
        "--backend", choices=_names.BACKENDS, default="auto", metavar="NAME",
        help="auto, triton or torch (default: %(default)s)",
    )  # fmt: skip


def add_json(parser: Parser, what: str = "the figures") -> None:
    """Add --json, which `deit_fast.cli._json` serves."""
    parser.add_argument(
        "--json", nargs="?", type=Path, const=STDOUT, metavar="FILE",
        help=f"{what} as JSON, to FILE, or alone on standard output",
    )  # fmt: skip


def add_recipe(parser: Parser, names: tuple[str, ...] | None = None) -> None:
    """Add options for a recipe and for its settings, or for those of them that are named."""
    parser.add_argument(
        "--recipe", default="deit", metavar="NAME",
        help=f"{', '.join(recipes.NAMES)}, or a .json file (default: %(default)s)",
    )  # fmt: skip
    group = parser.add_brief_group("settings of the recipe")
    for setting in dataclasses.fields(recipes.Recipe):
        if names is not None and setting.name not in names:
            continue
        kind = cast(type, setting.type)  # no annotation of `Recipe` is a string
        options: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            f"--{setting.name.replace('_', '-')}", dest=f"recipe_{setting.name}",
            help=setting.metadata["help"].replace("%", "%%"), **options,
        )  # fmt: skip


def add_teacher(parser: argparse._ActionsContainer, required: bool = False) -> None:
    """Add --teacher and where its weights are."""
    parser.add_argument(
        "--teacher", metavar="MODEL", required=required,
        help="a name, or a folder (OUT/model of deit-fast train)",
    )  # fmt: skip
    parser.add_argument("--teacher-checkpoint", metavar="PATH", help="(default: from the hub)")
    add_key(parser, "--teacher-checkpoint-key")
