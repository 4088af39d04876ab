"""What `python -m deit_fast.tune` calls: the options are parsed before torch is imported."""

import sys

from deit_fast._argparse import Parser, describe

from . import options


def main(argv: list[str] | None = None) -> int:
    """Run `python -m deit_fast.tune`; returns the exit code, 2 for a wrong call."""
    shown = describe(options.__doc__)
    parser = Parser(
        prog="python -m deit_fast.tune", description=shown["description"],
        epilog=shown["epilog"].replace("deit-fast tune", "python -m deit_fast.tune"),
    )  # fmt: skip
    options.add_arguments(parser)
    args = parser.parse_args(argv)
    from .command import run  # takes seconds: after the options were parsed

    try:
        return run(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"deit_fast.tune: {error}", file=sys.stderr)
        return 2
