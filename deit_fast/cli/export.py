"""What `deit-fast export` does; its options are in parsers/export.py."""

import argparse

import torch

from deit_fast.export import check, export

from . import _models


def run(args: argparse.Namespace) -> int:
    """Export the model, and return the exit status."""
    check(args.out, args.format, args.batch)  # before weights are downloaded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _models.load(args).to(device, _models.DTYPES[args.dtype])
    print(export(model, args.out, args.format, batch=args.batch, backend=args.backend))
    return 0
