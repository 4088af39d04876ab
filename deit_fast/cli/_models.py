"""The options by which commands name a model."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deit_fast
from deit_fast.kernels.classifier import FUSIONS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser, heads: bool = True) -> None:
    """Add the options that say which weights a model gets.

    Args:
        parser: The command's.
        heads: Whether to add --heads.
    """
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH",
        help="official .pth, .safetensors, or what a trainer saved; no code in it is run",
    )  # fmt: skip
    add_key(parser, "--checkpoint-key")
    parser.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction,
        help="weights from the hub (default without --checkpoint); --no-pretrained: random ones",
    )  # fmt: skip
    if heads:
        parser.add_argument(
            "--heads", choices=FUSIONS, help="output of a distilled model (default: joint)"
        )
    else:
        parser.set_defaults(heads=None)
    parser.add_argument("--img-size", type=int, metavar="PX", help="(default: the model's own)")


def add_key(parser: argparse._ActionsContainer, option: str, **options: Any) -> None:
    """Add an option for the entry of a checkpoint.

    Args:
        parser: The command's.
        option: Its name.
        **options: Of `add_argument`.
    """
    parser.add_argument(
        option, metavar="KEY",
        help="which entry of that file, such as model_ema, teacher or state_dict.student (default: "
        "the usual)", **options,
    )  # fmt: skip


def load(args: argparse.Namespace, strict: bool = True) -> nn.Module:
    """Load the model of `args.model`, on the CPU, in eval mode.

    Args:
        args: The options of `add_arguments`, and "model" and "command".
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
