"""What `deit-fast finetune` does; its options are in parsers/finetune.py."""

import argparse

from . import train


def run(args: argparse.Namespace) -> int:
    """Train on from --from; returns the exit code."""
    if args.start is None:
        raise ValueError("--from: missing, expected a folder of weights, a file, or 'pretrained'")
    return train.run(args)
