"""Write a teacher's soft labels once, and train without it (TinyViT).

Exit code: 0; 1 where info finds a store incomplete or damaged; 2 for an error; 130 and 143 after
Ctrl-C and SIGTERM.

Example:
  deit-fast distill-store write imagenet/ labels/ --teacher regnety_160 --img-size 224 --epochs 300
"""

from pathlib import Path

from deit_fast._argparse import Parser, describe
from deit_fast.distill.recipe import VIEW_SETTINGS

from . import _options, train

_WRITE = """Write the teacher's soft labels of every augmented image of every epoch.

For each image and epoch that is the seed of its augmentation and the K most probable classes. The
same command goes on where it stopped; with more --epochs it adds them.

Example:
  torchrun --nproc-per-node 8 -m deit_fast distill-store write imagenet/ labels/ --epochs 300 \\
      --teacher regnety_160 --img-size 224
"""
_CHECK = """Ask the teacher again, on a sample.

Example:
  deit-fast distill-store check imagenet/ labels/ --teacher regnety_160
"""
_TRAIN = """Train a student from the store alone.

It is deit-fast train --store STORE: the images are, bit for bit, those the teacher saw.

Example:
  deit-fast distill-store train imagenet/ labels/ --model tiny_vit_5m_224 --out tiny
"""
_INFO = """Show what is in a store, and whether it is whole.

Every file is read, and what is damaged named: delete such a file, and write creates it anew.

Example:
  deit-fast distill-store info labels/
"""


def add_arguments(parser: Parser) -> None:
    """Add the command's actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text, add in (
        ("write", _WRITE, _add_write),
        ("check", _CHECK, _add_check),
        ("train", _TRAIN, _add_train),
        ("info", _INFO, _add_info),
    ):
        add(actions.add_parser(name, **describe(text)))


def _add_write(parser: Parser) -> None:
    _add_both(parser)
    parser.add_argument("--epochs", type=int, required=True, metavar="N")
    parser.add_argument(
        "--k", type=int, default=10, metavar="K",
        help="classes a record; 100 for ImageNet-21k (default: %(default)s)",
    )  # fmt: skip
    _options.add_img_size(parser, "the teacher's own")
    parser.add_argument("--count", type=int, metavar="N", help="so many of the images only")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--batch", type=int, default=256, metavar="B",
        help="images of each rank in one forward pass (default: %(default)s)",
    )  # fmt: skip
    _options.add_amp(parser, "(default: the best the GPU has; none on a CPU)")
    _options.add_training_workers(parser)
    _options.add_recipe(parser, VIEW_SETTINGS)


def _add_check(parser: Parser) -> None:
    _add_both(parser)
    parser.add_argument(
        "--samples", type=int, default=1024, metavar="N",
        help="at least so many records, in whole batches (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="that draws them")
    _options.add_amp(parser, "(default: the store's)")
    _options.add_json(parser)


def _add_both(parser: Parser) -> None:
    parser.add_argument("data", metavar="DATA", help="as train takes it")
    parser.add_argument("store", metavar="STORE", type=Path, help="a folder")
    _options.add_teacher(parser, required=True)
    _options.add_backend(parser)
    _options.add_image_keys(parser)


def _add_train(parser: Parser) -> None:
    train.add_arguments(parser, from_store=True)


def _add_info(parser: Parser) -> None:
    parser.add_argument("store", metavar="STORE", type=Path, help="a folder")
    _options.add_json(parser, "what is there")
