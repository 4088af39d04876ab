"""The `deit-fast` command."""

import argparse
import sys

from deit_fast.tune import command as tune

from . import (
    analyse,
    bench,
    classify,
    demo,
    distill_store,
    eval,
    export,
    finetune,
    info,
    quantize,
    train,
)

COMMANDS = {
    "demo": demo, "classify": classify, "export": export, "bench": bench, "tune": tune,
    "train": train, "finetune": finetune, "distill-store": distill_store, "eval": eval,
    "analyse": analyse, "quantize": quantize, "info": info,
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of `deit-fast` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="deit-fast",
        description="DeiT on NVIDIA GPUs with fused kernels, computing what timm computes.",
        epilog="deit-fast COMMAND --help shows examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, examples = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None: those of the process.

    Returns:
        The exit code: 0; 1 if some input failed; 2 for an error; 130 for Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        print(f"deit-fast {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"deit-fast {args.command}: {error}", file=sys.stderr)
        return 2
