"""compute-sanitizer over every kernel family: accesses out of bounds or misaligned.

python -m benchmarks.lease.sanitize --script      the launches themselves, without the tool
"""

import argparse
import os
import re
import shutil
import subprocess
import sys

import torch

from benchmarks.operations import NO_BACKWARD, OPS, both_ways, cast, operations, tensors
from deit_fast.bench.modes import MODES
from deit_fast.kernels.cases import deit_cases

from .context import Context

TOOLS = ("memcheck", "initcheck")
BATCH = 3  # rows that no tile divides
NETWORK = "Ti"
ERROR_STATUS = 9


def launches(device: torch.device) -> int:
    """Every operation once, forward and where it trains backward; returns how many calls."""
    with MODES["eager_fp32"].settings():
        count = sum(launch(op, device) for op in OPS)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


@torch.no_grad()
def launch(op: str, device: torch.device) -> int:
    """One operation; returns how many calls."""
    count = 0
    for operation in operations(op):
        for case in deit_cases(op, NETWORK, BATCH).values():
            inputs = cast(operation.inputs(**case, device=device), torch.bfloat16)
            operation.call(**inputs)
            count += 1
        if op in NO_BACKWARD:
            continue
        shapes = [y.shape for y in tensors(operation.reference(**inputs))]
        upstream = {
            f"upstream_{i}": torch.randn(shape, device=device).to(torch.bfloat16)
            for i, shape in enumerate(shapes)
        }
        both_ways(operation.call)(**inputs, **upstream)
        count += 1
    return count


def step(ctx: Context) -> str:
    """Run the script under each tool, memcheck first; returns what was found."""
    said = []
    for tool in TOOLS:
        if said and (ctx.left() < 20 or ctx.small):
            break
        row = _run_tool(tool, ctx)
        ctx.write("sanitizer", **row)
        said.append(f"{tool}: {row['note'] or row['status']}")
    return "; ".join(said)


def _run_tool(tool, ctx):
    row = {"tool": tool, "errors": None, "note": ""}
    if not shutil.which("compute-sanitizer"):
        return row | {"status": "unavailable", "note": "compute-sanitizer is not installed"}
    # Real allocations, so that the tool sees the true bounds. Not from the checkout's folder, whose
    # deit_fast has no kernels in it: the import path knows where they are.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERROR_STATUS),
        "--print-limit", "20", sys.executable, "-m", "benchmarks.lease.sanitize", "--script",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, env=env, cwd=ctx.work, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=max(1.0, ctx.left()),
        )  # fmt: skip
    except subprocess.TimeoutExpired as over:
        text = over.stdout or b""
        print(text.decode(errors="replace") if isinstance(text, bytes) else text)
        return row | {"status": "timeout", "note": "its time was over"}
    print(done.stdout)
    return row | judge(done.stdout, done.returncode)


def judge(output: str, status: int) -> dict:
    """status, errors and note of what the tool printed and its exit status."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", output)
    if found is None:
        last = (output.strip().splitlines() or ["no output"])[-1]
        return {"status": "failed", "note": f"no summary, exit status {status}: {last}"[:300]}
    errors = int(found[1])
    if not errors and status:
        last = [line for line in output.splitlines() if not line.startswith("=========")][-1:]
        note = f"the script failed with status {status}: {' '.join(last)}"
        return {"status": "failed", "errors": 0, "note": note[:300]}
    first = re.search(r"========= (Invalid|Uninitialized|Program hit)[^\n]*", output)
    where = re.search(r"=========\s+at ([^\n]*)", output)
    note = "; ".join(m[0].strip("= ") for m in (first, where) if m) if errors else ""
    note = f"{errors} errors: {note}" if errors else ""
    return {"status": "failed" if errors else "passed", "errors": errors, "note": note[:300]}


def main(argv: list[str] | None = None) -> int:
    """The script that compute-sanitizer runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease.sanitize")
    parser.add_argument("--script", action="store_true", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: a GPU if any)")
    args = parser.parse_args(argv)
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{launches(torch.device(name))} calls on {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
