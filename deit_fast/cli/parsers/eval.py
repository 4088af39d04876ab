"""Measure top-1 and top-5 of a model over labelled images.

A distilled model has a row for each head. Labels are compared by number: DATA has to have the
model's classes, in sorted order, and all of them. --real takes the ReaL labels of ImageNet's
validation images (Beyer et al., 2020).

Exit code: 0; 1 where images could not be read and were skipped; 2 for an error; 130 for Ctrl-C.

Examples:
  deit-fast eval imagenet --model deit_small_distilled
  deit-fast eval cifar10 --model runs/tiny/model --json tiny.json
"""

from pathlib import Path

from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    _options.add_images(parser)
    parser.add_argument("--model", required=True, metavar="NAME", help=_options.NAME)
    parser.add_argument("--real", type=Path, metavar="FILE", help="also judge by these labels")
    _options.add_json(parser)
    _options.add_weights(parser, heads=False)  # all of them are shown
    _options.add_running(parser)
