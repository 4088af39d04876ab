"""The `deit-fast` command.

`parsers/` describes the commands, without torch; each module beside it runs one of them.
"""

import importlib
import sys
from types import ModuleType

from .parsers import COMMANDS, build_parser

__all__ = ["COMMANDS", "build_parser", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None: those of the process.

    Returns:
        The exit code: 0; 1 if some input failed; 2 for an error; 130 for Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    try:
        return _module(args.command).run(args)
    except KeyboardInterrupt:
        print(f"deit-fast {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"deit-fast {args.command}: {error}", file=sys.stderr)
        return 2


def _module(command: str) -> ModuleType:
    """Import what runs a command, which takes seconds."""
    if command == "tune":
        return importlib.import_module("deit_fast.tune.command")
    return importlib.import_module(f"{__name__}.{command.replace('-', '_')}")
