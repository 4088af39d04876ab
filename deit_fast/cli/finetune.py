"""Train on from weights, at another resolution or on other classes.

Examples:
  deit-fast finetune imagenet/ --from s/model --img-size 384 --teacher regnety_160 --out s384
  deit-fast finetune imagenet/ --from pretrained --model deit_base --img-size 384 --out b384
  deit-fast finetune cifar/ --from s/model --recipe transfer --out cifar
  deit-fast finetune cars/ --from deit_small.pth --model deit_small --recipe transfer --out cars

The position embedding is resized bicubically without antialiasing, which keeps the norm of its
vectors (DeiT paper, section 3); the teacher sees the new resolution too, its own position embedding
resized likewise. Heads for another number of classes begin anew. The default recipe is deit-384.
Everything else is as in deit-fast train, whose --help has more examples.
"""

import argparse

from . import train

RECIPE = "deit-384"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of deit-fast train, with another default recipe."""
    train.add_arguments(parser)
    parser.set_defaults(recipe=RECIPE)


def run(args: argparse.Namespace) -> int:
    """Train on from --from; returns the exit code."""
    if args.start is None:
        raise ValueError("--from: missing, expected a folder of weights, a file, or 'pretrained'")
    return train.run(args)
