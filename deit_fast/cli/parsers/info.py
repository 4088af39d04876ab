"""Show versions, the chip, what serves each operation, what to do next.

With --json: all of it for a program, and for a report of a problem.

Example:
  deit-fast info
"""

from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--chip", metavar="X.Y", help="a compute capability such as 7.0, instead of this machine's"
    )
    _options.add_json(parser, "all of it")
