"""The parser of the commands: help that fits a screen, errors that suggest what was meant."""

import argparse
import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NoReturn


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 32} | options)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that names no more than it has to.

    The usage has the positional arguments and the required options. An error about an unknown
    command, option or choice suggests those like it. A group from `add_brief_group` is a list of
    names in --help, and explained by --help-all.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": _Formatter} | options)
        self.brief: list[argparse._ArgumentGroup] = []

    def add_brief_group(self, title: str) -> argparse._ArgumentGroup:
        """Add a group of rarely used options."""
        if not self.brief:
            self.add_argument(
                "--help-all", action=_HelpAll, nargs=0, help="explain all options and exit"
            )
        self.brief.append(self.add_argument_group(title))
        return self.brief[-1]

    def format_usage(self) -> str:
        """Return the usage, of one line or two."""
        formatter = self._get_formatter()
        self._add_usage(formatter)
        return formatter.format_help()

    def format_help(self, brief: bool = True) -> str:
        """Return the help.

        Args:
            brief: Whether the options of brief groups are only named.
        """
        formatter = self._get_formatter()
        self._add_usage(formatter)
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            if brief and group in self.brief:
                formatter.add_text(_listed(group._group_actions))
            else:
                formatter.add_arguments(group._group_actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _add_usage(self, formatter: argparse.HelpFormatter) -> None:
        actions = [a for a in self._actions if a.required or not a.option_strings]
        if self._subparsers is None:
            actions.append(argparse.Action([], "options", metavar="[options]"))
        formatter.add_usage(self.usage, actions, [])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; what is left over is an error of this parser, whose options are suggested."""
        args = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None and not {"-h", "--help"} & set(args):
            options = takewhile(lambda one: one != "--", args)
            self._refuse([one for one in options if self._is_unknown(one)])  # before what misses
        namespace, left = super().parse_known_args(args, namespace)
        self._refuse(left)
        return namespace, left

    def _is_unknown(self, arg: str) -> bool:
        name = arg.partition("=")[0]
        return name[:2] == "--" and not any(known.startswith(name) for known in self._known)

    @property
    def _known(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def _refuse(self, args: list[str]) -> None:
        if args:
            hints = [f"{arg}{_near(arg.partition('=')[0], self._known)}" for arg in args]
            self.error(f"unrecognized arguments: {' '.join(hints)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            hint = _near(str(value), known) or f", expected one of {', '.join(known)}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}")

    def error(self, message: str) -> NoReturn:
        """Print the usage and an error, and exit with code 2."""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n")


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        print(parser.format_help(brief=False), end="")
        parser.exit()


def describe(text: str | None) -> dict[str, Any]:
    """Split a docstring: its first line is the summary, what begins with "Example" the epilog.

    Returns:
        The arguments help, description and epilog of `add_parser`.
    """
    description, example, epilog = (text or "").strip().partition("\n\nExample")
    summary = description.partition("\n\n")[0].replace("%", "%%")
    epilog = (example + epilog).strip().replace("%", "%%")
    return {"help": summary, "description": description.replace("%", "%%"), "epilog": epilog}


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _listed(actions: list[argparse.Action]) -> str:
    names = ", ".join(action.option_strings[0] for action in actions)
    width = shutil.get_terminal_size().columns - 6
    return textwrap.fill(names, width, break_on_hyphens=False) + "; see --help-all"
