"""The parsers of `deit-fast`: they import neither torch, timm, numpy nor what needs them.

Each module describes one command: its docstring is the help (summary, notes, examples), and
`add_arguments(parser)` adds the options. What the command does is `run(args)` of the module of the
same name in `deit_fast.cli`.
"""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import deit_fast
from deit_fast._argparse import Parser, describe
from deit_fast.tune import options as tune

from . import (
    analyse,
    bench,
    classify,
    completion,
    data,
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
    "data": data, "train": train, "finetune": finetune, "distill-store": distill_store,
    "eval": eval, "analyse": analyse, "quantize": quantize, "info": info, "completion": completion,
}  # fmt: skip


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(", ".join(f"{name} {version_of(name)}" for name in ("deit_fast", "torch", "triton")))
        print(f"Python {platform.python_version()}")
        parser.exit()


def version_of(name: str) -> str:
    """Return a package's version, without importing it."""
    if name == "deit_fast":
        return deit_fast.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def build_parser() -> Parser:
    """Build the parser of `deit-fast`, with one for each command; torch is not imported."""
    parser = Parser(
        prog="deit-fast",
        description="DeiT on NVIDIA GPUs with fused kernels, computing what timm computes.",
        epilog="Example:\n  deit-fast classify cat.jpg\n\ndeit-fast COMMAND --help shows more.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0,
        help="show the versions of deit_fast, torch, triton and Python, and exit",
    )  # fmt: skip
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, **describe(module.__doc__)))
    return parser
