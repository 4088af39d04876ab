"""Compare classifiers, draw attention maps, make tables of runs.

Exit code: 0; 1 where images could not be read and were skipped; 2 for an error; 130 for Ctrl-C.

Example:
  deit-fast analyse disagreement imagenet --models deit_small deit_small_distilled
"""

from pathlib import Path

from deit_fast import _names
from deit_fast._argparse import Parser, describe

from . import _options

MOST = 64  # images, a row each: a figure that is higher can't be looked at
_DISAGREEMENT = """Disagreement rate of classifiers.

The rate of images for which two classifiers predict different classes, the labels first (DeiT
paper, Table 4). NAME:HEAD takes one head of a distilled model, NAME all of them.

Example:
  deit-fast analyse disagreement imagenet --models deit_base runs/b/model:class --out table4
"""
_TOKENS = """How alike class and distillation token are.

Their mean cosine at the input, after each block and after the norm.

Example:
  deit-fast analyse tokens imagenet --model deit_base_distilled --out tokens
"""
_ATTENTION = """What a model's tokens attend to, as a figure.

How much class and distillation token attend to each patch, drawn over the images: of one block (the
mean of its heads) or of all (rollout).

Example:
  deit-fast analyse attention cat.jpg dog.jpg --rollout --out maps.png
"""
_TABLE = """A table of training runs.

A row for runs that differ only in their seed: mean and standard deviation.

Example:
  deit-fast analyse table runs/* --out results.md
"""


def add_arguments(parser: Parser) -> None:
    """Add the analyses and their options."""
    kinds = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")

    pairs = kinds.add_parser("disagreement", **describe(_DISAGREEMENT))
    _options.add_images(pairs)
    pairs.add_argument(
        "--models", required=True, nargs="+", metavar="NAME[:HEAD]",
        help=f"a name or folder, and perhaps a head: {', '.join(_names.HEADS)}",
    )  # fmt: skip
    pairs.set_defaults(**dict.fromkeys(("checkpoint", "checkpoint_key", "pretrained", "heads")))
    pairs.set_defaults(img_size=None)

    tokens = kinds.add_parser("tokens", **describe(_TOKENS))
    _options.add_images(tokens)
    tokens.add_argument("--model", required=True, metavar="NAME", help="distilled, or a folder")
    tokens.add_argument(
        "--count", type=int, default=1000, metavar="N",
        help="images, spread over DATA (default: %(default)s)",
    )  # fmt: skip
    for one in (pairs, tokens):
        one.add_argument("--out", type=Path, metavar="DIR", help="also write files and a plot")
        _options.add_json(one)
    _options.add_weights(tokens, heads=False)
    for one in (pairs, tokens):
        _options.add_running(one)

    maps = kinds.add_parser("attention", **describe(_ATTENTION))
    maps.add_argument(
        "images", nargs="+", metavar="IMAGE", help=f"as classify takes them, at most {MOST}"
    )
    maps.add_argument(
        "--model", default="deit_small_distilled", metavar="NAME",
        help="a ViT, DeiT or CaiT, or a folder (default: %(default)s)",
    )  # fmt: skip
    maps.add_argument("--block", type=int, metavar="I", help="from 0, or -1 for the last (default)")
    maps.add_argument("--rollout", action="store_true", help="through all blocks instead")
    maps.add_argument("--out", type=Path, required=True, metavar="PNG", help="the figure")
    _options.add_weights(maps, heads=False)

    table = kinds.add_parser("table", **describe(_TABLE))
    table.add_argument("runs", nargs="+", metavar="RUN", help="folder with run.json, result.json")
    table.add_argument("--out", type=Path, metavar="FILE", help="write Markdown, print nothing")
