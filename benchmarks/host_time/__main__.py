"""What a call costs the host: microseconds of Python and dispatcher, without a GPU.

    python -m benchmarks.host_time                      DeiT-Ti, S and B distilled, batch 1, bf16
    python -m benchmarks.host_time --dtype fp16
    python -m benchmarks.host_time --autocast           fp32 weights, matmuls in --dtype
    python -m benchmarks.host_time --quick              DeiT-Ti, few rounds, few operations
    python -m benchmarks.host_time --stages             an engine's call in its parts, nothing else
    python -m benchmarks.host_time --where              operations: in Python in parts, and as plans

For timm's eager model, ours, and ours in an `InferenceEngine`; and for each operation, PyTorch's
eager reference and ours. Tensors lie on the CPU and count as lying on an H100:

- Triton specialises and launches our kernels; the driver is a stand-in that does nothing.
- PyTorch's own operators, timm's and those between our kernels, pass through Python, dispatcher and
  autograd, check shapes and allocate, and compute nothing. They are no meta tensors: several shape
  functions of those are in Python, and take longer than a real call.
- Around an engine's graph torch.cuda's Python runs as it is. Streams, events, the graph and what
  torch.cuda calls in C are no-ops, and images count as lying on the GPU.

Left out on all sides, and so not in the ratio: the driver's part of a launch, some 2 to 4 us each
(the last column counts them), CUDA's allocator (malloc takes its place), the choice of cuBLAS's and
cuDNN's algorithms. Backward runs on the caller's thread, as it does on a CPU.

CPU time of this process, one thread; the calls take turns, in blocks, in an order that
changes every round. A ratio is the median of the rounds' ratios; the spread is from the 20th to the
80th percentile, as a share of the median.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.operations import OPS

from . import stages, where
from .rows import DTYPES, NETWORKS, measure
from .table import markdown, stages_markdown, where_markdown


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """The command. Bad options end it with status 2 and one line."""
    parser = _Parser(prog="python -m benchmarks.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=None)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--autocast", action="store_true", help="fp32 weights, matmuls in --dtype")
    parser.add_argument("--rounds", type=int, default=None, help="default: 15; --quick: 3")
    parser.add_argument("--operations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="DeiT-Ti, few operations")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--stages", action="store_true", help="an engine's call in its parts")
    only.add_argument("--where", action="store_true", help="operations in Python, and as plans")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as data")
    args = parser.parse_args(argv)
    rounds = args.rounds if args.rounds is not None else 3 if args.quick else 15
    if rounds < 1:
        parser.error(f"--rounds: {rounds}, expected 1 or more")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: {args.json.parent} is no folder")
    networks = args.networks or list(NETWORKS)[: 1 if args.quick else None]
    ops = OPS[: 3 if args.quick else None] if args.operations else ()
    try:
        if args.stages:
            data = stages.measure(networks, args.dtype, args.autocast, rounds, args.quick)
        elif args.where:
            data = where.measure(args.dtype, rounds, ops, args.quick)
        else:
            data = measure(networks, args.dtype, args.autocast, rounds, ops, args.quick)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    table = stages_markdown if args.stages else where_markdown if args.where else markdown
    print(table(data))
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
