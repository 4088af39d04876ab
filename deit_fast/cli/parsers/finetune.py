"""Train on from weights, at another resolution or on other classes.

The position embedding is resized bicubically without antialiasing, which keeps the norm of its
vectors (DeiT paper, section 3); the teacher sees the new resolution too, its own position embedding
resized likewise. Heads for another number of classes begin anew. The rest is as in deit-fast train.

Examples:
  deit-fast finetune cifar/ --from s/model --recipe transfer --out cifar
  deit-fast finetune imagenet/ --from pretrained --model deit_base --img-size 384 --out b384
"""

from deit_fast._argparse import Parser

from . import train


def add_arguments(parser: Parser) -> None:
    """Add the options of deit-fast train, with another default recipe."""
    train.add_arguments(parser)
    parser.set_defaults(recipe="deit-384")
