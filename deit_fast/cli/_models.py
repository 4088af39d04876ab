"""The model that a command's options name."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deit_fast
from deit_fast import _names

DTYPES = {name: getattr(torch, of) for name, of in _names.DTYPES.items()}


def load(args: argparse.Namespace, strict: bool = True) -> nn.Module:
    """Load the model of `args.model`, on the CPU, in eval mode.

    Args:
        args: The options of `parsers._options.add_weights`, and "model" and "command".
        strict: Whether a model in which nothing can be accelerated, such as a convolutional
            teacher, is an error.

    Returns:
        The accelerated model.

    Raises:
        ValueError: For options that do not fit each other or the model.
        RuntimeError: If there are no pretrained weights.
    """
    size = {} if args.img_size is None else {"img_size": args.img_size}
    if Path(args.model).is_dir():
        given = args.checkpoint, args.checkpoint_key, args.pretrained
        if any(value is not None for value in given):
            raise ValueError(
                f"--model {args.model}: a folder with weights of its own, expected neither "
                "--checkpoint nor --checkpoint-key nor --[no-]pretrained"
            )
        return deit_fast.from_pretrained(args.model, heads=args.heads, strict=strict, **size).eval()
    pretrained = args.checkpoint is None if args.pretrained is None else args.pretrained
    options: dict[str, Any] = {"checkpoint": args.checkpoint, "heads": args.heads or "joint"}
    options |= {"strict": strict, "checkpoint_key": args.checkpoint_key} | size
    if not pretrained:
        if args.checkpoint is None:
            print(
                f"deit-fast {args.command}: random weights, the predictions mean nothing",
                file=sys.stderr,
            )
            torch.manual_seed(0)
        return deit_fast.create_model(args.model, **options).eval()
    if args.checkpoint is not None:
        raise ValueError("--pretrained and --checkpoint: expected one of them, got both")
    try:
        return deit_fast.create_model(args.model, pretrained=True, **options).eval()
    except (OSError, RuntimeError) as error:  # no network, no such repository, unknown name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"no pretrained weights for {args.model} ({reason}); "
            "--checkpoint PATH takes a local file"
        ) from error
