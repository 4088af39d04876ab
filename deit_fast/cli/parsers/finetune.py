"""Make a classifier of your own images, from a model that was trained on others.

DATA is a folder with a folder of images for each class, or anything that deit-fast train takes.
Where it has no validation images, a fifth is set aside. A recipe is chosen from the number of
images, and printed with the reasons and the minutes it should take. The same command goes on.

With --recipe NAME it is DeiT's fine-tuning: at another resolution the position embedding is resized
bicubically (DeiT paper, section 3). Heads for another number of classes begin anew.

Examples:
  deit-fast finetune photos/
  deit-fast finetune photos/ --freeze backbone --out probe
  deit-fast finetune imagenet/ --model deit_base --img-size 384 --recipe deit-384 --out b384
"""

import argparse

from deit_fast._argparse import Parser

from . import train


def add_arguments(parser: Parser) -> None:
    """Add the options of deit-fast train, with other defaults, and those of a plan."""
    train.add_arguments(parser, finetune=True)
    parser.set_defaults(recipe="auto")
    plan = parser.add_argument_group("the plan")
    plan.add_argument("--dry-run", action="store_true", help="print the plan, and train nothing")
    plan.add_argument(
        "--time", metavar="TIME", help="what training may take, such as 30m: fewer epochs then"
    )
    plan.add_argument(
        "--runs", type=int, default=1, metavar="N", help="so many seeds; the best model is kept"
    )


def layers(text: str) -> int:
    """What --freeze takes: a number of blocks, or "backbone" for all: -1."""
    if text == "backbone":
        return -1
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number or backbone") from None
