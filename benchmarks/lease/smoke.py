"""Every kernel family once on the device: its error beside PyTorch's own, forward and backward.

A family that is wrong, or that breaks its process, is named, and PyTorch serves it in the steps
that follow: fast and wrong is not measured.
"""

import warnings

import torch

from benchmarks.operations import (
    NO_BACKWARD,
    OPS,
    QUANTIZED,
    Operation,
    allowance,
    both_ways,
    cast,
    error_of,
    operations,
    tensors,
)
from deit_fast.bench import timing
from deit_fast.bench.failures import device_is_lost, reason
from deit_fast.bench.modes import MODES, PRECISIONS
from deit_fast.kernels import _chips, _policy
from deit_fast.kernels.cases import deit_cases

from .context import Context

BACKWARD = " backward"
BATCH, ODD, SMALL = 32, 3, 1
HALVES = (torch.bfloat16, torch.float16)
# what serves a family, where that is another name
POLICY = {"layer_norm_attention": "attention", "layer_norm_mlp": "linear"}


def groups(small: bool) -> list[str]:
    """The parts of the step: each operation forward, then backward, then what is not DeiT's."""
    ours, rest = OPS[:8], OPS[8:]
    backward = [op + BACKWARD for op in (*ours, *rest) if op not in NO_BACKWARD]
    return [*ours, *backward, *rest]


def step(ctx: Context, part: str) -> str:
    """Check one operation in one direction; returns what failed, "" where nothing did."""
    op, backward = part.removesuffix(BACKWARD), part.endswith(BACKWARD)
    there = {_key(row) for row in ctx.rows("smoke") if row["status"] == "passed"}
    failed = []
    networks = ("Ti",) if ctx.small else ("B", "S", "Ti")
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not written with NaN
    try:
        for operation in operations(op):
            for network in networks:
                for row, make, dtype in cases(
                    operation, op, network, backward, ctx.small, ctx.device
                ):
                    if _key(row) in there:
                        continue
                    row |= _checked(operation, make, dtype, backward, ctx.device)
                    ctx.write("smoke", **row)
                    if row["status"] == "failed":
                        failed.append(f"{row['case']} {row['dtype']}: {row['note']}".strip())
                        if row["lost"]:
                            raise RuntimeError(row["note"])
                timing.release(ctx.device)
    finally:
        torch.use_deterministic_algorithms(False)
    return f"{len(failed)} failed, first {failed[0]}" if failed else ""


def _key(row):
    return tuple(row[name] for name in ("family", "network", "case", "batch", "dtype", "backward"))


def cases(operation, op, network, backward, small, device):
    """The checks of an operation on a network's shapes.

    Those for which the device has the instructions.

    Yields:
        (row so far, `make(device)` of the inputs, dtype).
    """
    quantized = op in QUANTIZED
    capability = _chips.capability(device.type, device.index)
    without_fp8 = capability is not None and capability < (8, 9)
    for batch in (SMALL,) if small else (BATCH, ODD) if network == "B" else (BATCH,):
        for label, case in deit_cases(op, network, batch).items():
            if without_fp8 and label.startswith("fp8"):
                continue
            for dtype in _dtypes(quantized, network, batch, small):
                row = {
                    "family": operation.name, "op": op, "network": network, "case": label,
                    "batch": batch, "dtype": PRECISIONS[dtype], "backward": backward,
                }  # fmt: skip
                yield row, lambda device, case=case: operation.inputs(**case, device=device), dtype


def _dtypes(quantized, network, batch, small):
    if quantized or small or network != "B" or batch == ODD:
        return HALVES[:1]
    return (*HALVES, torch.float32)


def _checked(operation: Operation, make, dtype, backward, device):
    """error, pytorch_error, status, note; lost: whether the device is of no more use."""
    call, reference = operation.call, operation.reference
    exact = operation.exact or reference
    wide = torch.float32 if operation.exact else torch.float64
    try:
        with MODES["eager_fp32"].settings(), torch.no_grad():
            torch.manual_seed(0)
            inputs = make(device)
            if backward:
                shapes = [y.shape for y in tensors(reference(**make("meta")))]
                inputs |= {
                    f"upstream_{i}": torch.randn(shape, device=device)
                    for i, shape in enumerate(shapes)
                }
                call, reference, exact = both_ways(call), both_ways(reference), both_ways(exact)
            made = cast(inputs, dtype)
            plain = reference(**made)
            truth = exact(**cast(made, wide))
            error, pytorch = relative_error(call(**made), truth), relative_error(plain, truth)
            allowed = 2 * pytorch + allowance(made)
    except Exception as problem:
        lost = device_is_lost(problem)
        return {
            "error": None, "pytorch_error": None, "status": "failed", "note": reason(problem),
            "lost": lost,
        }  # fmt: skip
    good = error <= allowed  # NaN is not
    note = "" if good else f"relative error {error:.1e}, allowed {allowed:.1e}"
    return {
        "error": error if error == error else None, "pytorch_error": pytorch,
        "status": "passed" if good else "failed", "note": note, "lost": False,
    }  # fmt: skip


def relative_error(got, truth) -> float:
    """Of all outputs together; a rehearsal whose kernels do not run puts 0 in its place."""
    return error_of(got, truth)


def failed_families(rows: list[dict], crashed: list[str] = ()) -> frozenset[str]:
    """Families whose last check failed, with " backward" where it was the backward pass.

    Args:
        rows: Of the kind "smoke".
        crashed: Parts that broke their process before they had a row.
    """
    last = {_key(row): row for row in rows}
    failed = [row for row in last.values() if row["status"] == "failed"]
    names = {
        _family(row["op"], row["case"]) + BACKWARD * row["backward"] for row in failed
    }  # fmt: skip
    for part in crashed:
        op, backward = part.removesuffix(BACKWARD), part.endswith(BACKWARD)
        formats = ("fp8", "int8") if op in QUANTIZED else ("",)
        names |= {_family(op, of) + BACKWARD * backward for of in formats}
    return frozenset(names)


def _family(op, case):
    return case.split()[0] if op in QUANTIZED else op


def excluded(families: frozenset[str], training: bool) -> list[str]:
    """What "auto" must leave to PyTorch: of a training step the families that fail backward too."""
    names = {name for name in families if not name.endswith(BACKWARD)}
    if training:
        names |= {name.removesuffix(BACKWARD) for name in families}
    served = {POLICY.get(name, name) for name in names}
    return sorted(name for name in served if name in _policy.EXCLUDABLE)
