"""The options by which commands name a model."""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import deit_fast
from deit_fast.kernels.classifier import FUSIONS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(parser, heads=True):
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH",
        help="official .pth, .safetensors, or what a trainer saved; nothing in it is run",
    )  # fmt: skip
    add_key(parser, "--checkpoint-key")
    parser.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction,
        help="weights from the hub (default without --checkpoint); --no-pretrained: random ones",
    )  # fmt: skip
    if heads:
        parser.add_argument(
            "--heads", choices=FUSIONS, help="of a distilled model (default: joint)"
        )
    else:
        parser.set_defaults(heads=None)
    parser.add_argument("--img-size", type=int, metavar="PX", help="(default: the model's own)")


def add_key(parser, option, **options):
    parser.add_argument(
        option, metavar="KEY",
        help="which entry of that file, such as model_ema, teacher or state_dict.student (default: "
        "the usual)", **options,
    )  # fmt: skip


def load(args, strict: bool = True) -> nn.Module:
    """The model of `args.model`, on the CPU, in eval mode. strict=False: one in which there is
    nothing to accelerate, such as a teacher that is a convnet, too."""
    size = {} if args.img_size is None else {"img_size": args.img_size}
    if Path(args.model).is_dir():
        given = args.checkpoint, args.checkpoint_key, args.pretrained
        if any(value is not None for value in given):
            raise ValueError(
                f"--model {args.model}: a folder with weights of its own, expected neither "
                "--checkpoint nor --checkpoint-key nor --[no-]pretrained"
            )
        options = {"heads": args.heads, "strict": strict, **size}
        return deit_fast.from_pretrained(args.model, **options).eval()
    pretrained = args.checkpoint is None if args.pretrained is None else args.pretrained
    options = {"checkpoint": args.checkpoint, "heads": args.heads or "joint", "strict": strict}
    options |= size | {"checkpoint_key": args.checkpoint_key}
    if not pretrained:
        if args.checkpoint is None:
            print(
                f"deit-fast {args.command}: random weights, the labels mean nothing",
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
