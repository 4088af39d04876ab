"""Print a script with which a shell completes this command.

Commands, options, their values and files are completed; no network is needed.

bash: add `source <(deit-fast completion bash)` to ~/.bashrc. zsh: write the script to a file called
_deit-fast in a folder of $fpath.

Example:
  deit-fast completion bash > ~/.local/share/bash-completion/completions/deit-fast
"""

from deit_fast._argparse import Parser

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: Parser) -> None:
    """Add the command's argument."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
