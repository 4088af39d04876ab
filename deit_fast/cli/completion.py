"""What `deit-fast completion` does; its argument is in parsers/completion.py."""

import argparse
from typing import Any

import shtab

from deit_fast import _names
from deit_fast.distill import recipe

from .parsers import build_parser

# by what an argument is called: the files it takes, folders alone, or the name of a model
FILES = (
    "DATA", "FILE", "IMAGE", "PATH", "PNG", "RUN", "WEIGHTS",
)  # fmt: skip
FOLDERS = ("DIR", "STORE")
_NAMES = " ".join((*_names.MODELS, _names.NANO))
_COMPLETE_MODEL = {
    "bash": "_deit_fast_models",
    "zsh": f"({_NAMES})",
    "tcsh": f"({_NAMES})",
}
_RECIPES = f"({' '.join(recipe.NAMES)})"
_PREAMBLE = {  # models are names or folders
    "bash": f"""_deit_fast_models() {{
  compgen -W "{_NAMES}" -- "$1"
  compgen -d -- "$1"
}}
_deit_fast_recipes() {{
  compgen -W "{" ".join(recipe.NAMES)}" -- "$1"
  compgen -f -X '!*.json' -- "$1"
}}"""
}


def run(args: argparse.Namespace) -> int:
    """Print the script; returns the exit code."""
    parser = build_parser()
    _complete(parser)
    print(shtab.complete(parser, shell=args.shell, preamble=_PREAMBLE.get(args.shell, "")))
    return 0


def _complete(parser: argparse.ArgumentParser) -> None:
    """Say of each argument what completes it, as shtab looks it up."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete(command)
        elif action.choices is None and (how := _how(action)):
            action.complete = how  # type: ignore[attr-defined]


def _how(action: argparse.Action) -> Any:
    if action.dest in ("model", "models", "teacher"):
        return _COMPLETE_MODEL
    if action.dest == "recipe":
        return dict.fromkeys(("zsh", "tcsh"), _RECIPES) | {"bash": "_deit_fast_recipes"}
    if action.metavar in FILES:
        return shtab.FILE
    return shtab.DIRECTORY if action.metavar in FOLDERS else None
