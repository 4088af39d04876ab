"""Find the fastest implementations and tiles on this GPU.

The winners go to a table in the user's cache directory ($DEIT_FAST_CACHE, $XDG_CACHE_HOME/deit_fast
or ~/.cache/deit_fast), from where every process that uses this GPU takes them. Rows for other
shapes stay in the table; the shapes that it has are not measured again without --again. Each
candidate is checked against PyTorch before it is timed. When the minutes are over, or with Ctrl-C,
the winners found so far are written, and the same call continues from there.

Example:
  deit-fast tune --model deit_base_distilled --batch 64 256 --minutes 10
"""

from pathlib import Path

from deit_fast import _names
from deit_fast._argparse import Parser

DTYPES = ("bf16", "fp16")  # those whose GEMMs are tuned


def add_arguments(parser: Parser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="NAME", help="ours or timm's names"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[256], metavar="B", help="(default: 256)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", metavar="DTYPE",
        help="bf16 or fp16 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=_names.QUANTIZED_FORMATS, metavar="FORMAT",
        help="of quantized models: fp8 or int8 (default: none)",
    )  # fmt: skip
    parser.add_argument("--training", action="store_true", help="also what a training step runs")
    parser.add_argument("--image-size", type=int, metavar="PX", help="(default: the model's own)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, metavar="N",
        help="after which nothing is begun (default: 5)",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also shapes that the table has")
    parser.add_argument("--out", type=Path, metavar="PATH", help="another table than the cache's")
