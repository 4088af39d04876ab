"""Compare timm's DeiT and deit_fast, with the same weights, on real images.

Also classify images with a small model, trained on Fashion-MNIST, that is part of this package.
Without --pretrained the weights of the others are random (seed 0), and no network is needed.

Example:
  deit-fast demo
"""

from deit_fast._argparse import Parser


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--pretrained", action="store_true", help="timm's weights from the hub")
    parser.add_argument(
        "--batch", type=int, metavar="B", help="images per timed run (default: 256; 8 on a CPU)"
    )
