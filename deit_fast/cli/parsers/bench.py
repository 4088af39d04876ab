"""Measure images/s: eager PyTorch, torch.compile, deit_fast.

Weights are random: speed does not depend on them. Each mode's outputs are checked against eager
fp32 before it is timed. Ctrl-C keeps what was measured. An existing --json file gains or renews
rows. Protocols: batch, the median at that batch; paper, the largest batch that fits up to it, mean;
latency, each call waited for; host, as batch, from pinned host memory; step, as batch, a training
step with AdamW.

Exit code: 0; 1 where a row failed; 2 for an error; 130 for Ctrl-C.

Examples:
  deit-fast bench deit_small_distilled
  deit-fast bench deit_base_384 --batches 1,8,256 --modes eager_bf16,deit_fast_bf16 --json b.json
"""

from pathlib import Path

from deit_fast import _names
from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("model", metavar="MODEL", help="one of ours or any timm name")
    parser.add_argument("--image-size", type=int, metavar="PX", help="(default: the model's own)")
    parser.add_argument(
        "--modes", metavar="NAMES",
        help="such as eager_fp32,compile_bf16,deit_fast_fp8; all: --modes list (default: a few)",
    )  # fmt: skip
    parser.add_argument("--batches", metavar="NUMBERS", help="(default: 256; 8 on a CPU)")
    parser.add_argument(
        "--protocol", choices=_names.PROTOCOLS, default="batch", metavar="NAME",
        help=f"{', '.join(_names.PROTOCOLS)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=10, metavar="N", help="(default: %(default)s)"
    )
    _options.add_json(parser, "a results file")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR",
        help="save a trace of each mode, and show where a call spends its time",
    )  # fmt: skip
