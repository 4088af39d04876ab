"""What the compiler makes of every shipped kernel configuration, for chips that are not here.

    python -m benchmarks.ahead_of_time                    a table
    python -m benchmarks.ahead_of_time --json --arch 90   one JSON object a line
    python -m benchmarks.ahead_of_time --check            fails where a configuration is bad

Needs no GPU and no driver. Per configuration: registers and spills (ptxas -v), shared memory, CTAs
per SM, whether the matrix instructions are asynchronous, and the bytes and FLOPs of one DeiT call
at batch 256 that it serves. tests/benchmarks/test_ahead_of_time.py asserts on the same rows.
"""

import argparse
import json
from dataclasses import asdict

import triton

from deit_fast.kernels._chips import SHARED_MEMORY_LIMIT

from .compile import ARCHS, Row, rows
from .dtypes import BATCH
from .kernel_modules import OPS

HEADING = "sm op configuration regs spill smem CTAs wgmma waits MB GFLOP".split()
LINE = "{:>3} {:<16} {:<66} {:>4} {:>5} {:>7} {:>4} {:>5} {:>5} {:>7} {:>7}"


def line(row: Row) -> str:
    """A line of the table; "!" where ptxas serialised the matrix instructions."""
    waits = f"{row.waits_for_all}{'!' if row.serialized else ''}"
    return LINE.format(
        row.arch, row.op, row.label, row.registers, row.spill_bytes, row.shared_bytes,
        row.ctas_per_sm, row.wgmma, waits, f"{row.megabytes:.1f}", f"{row.gflop:.1f}",
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.ahead_of_time", description=__doc__.splitlines()[0]
    )
    made.add_argument(
        "--arch", type=int, nargs="+", default=ARCHS, choices=sorted(SHARED_MEMORY_LIMIT)
    )
    made.add_argument(
        "--check",
        action="store_true",
        help="fail where something is spilled, serialised or too large for the chip",
    )
    made.add_argument("--op", nargs="+", choices=OPS, help="only these operations")
    made.add_argument(
        "--every", type=int, default=1, help="compile one of every so many cases of a kernel"
    )
    made.add_argument(
        "--in-turn",
        action="store_true",
        help="compile each kernel for one chip only, the next one for the next chip",
    )
    made.add_argument("--json", action="store_true", help="one JSON object a line")
    return made


def main(argv: list[str] | None = None) -> None:
    """Print the rows; with --check exit with a message where one is bad."""
    args = parser().parse_args(argv)
    if not args.json:
        print(f"triton {triton.__version__}; MB and GFLOP of one call at batch {BATCH}")
        print(LINE.format(*HEADING))
    bad = 0
    for row in rows(args.arch, args.op, args.every, args.in_turn):
        bad += bool(row.spill_bytes or row.serialized or row.ctas_per_sm < 1)
        print(json.dumps(asdict(row)) if args.json else line(row), flush=True)
    if args.check and bad:
        raise SystemExit(f"{bad} configurations spill, serialise or do not fit")


if __name__ == "__main__":
    main()
