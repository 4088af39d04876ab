"""One implementation of one operation on one of DeiT's shapes, checked and timed: a `KernelRow`."""

import math
from collections.abc import Callable

import torch

from benchmarks.operations import (
    QUANTIZED,
    Operation,
    agree,
    both_ways,
    cast,
    flops_of,
    implementation_of,
    tensors,
    traffic,
)
from deit_fast import tune
from deit_fast.bench import results, timing
from deit_fast.bench.device import has_bf16
from deit_fast.bench.failures import failure_note
from deit_fast.bench.modes import MODES, PRECISIONS
from deit_fast.kernels import _chips, _policy
from deit_fast.kernels.quantize import FORMATS

FORWARD_BACKWARD = "forward+backward"  # part of such a row's case


def dtype_of(device: torch.device) -> torch.dtype:
    """bf16, fp16 on a GPU without it."""
    return torch.bfloat16 if has_bf16(device) else torch.float16


def case_name(case: str, backward: bool) -> str:
    """The case of a row: the shape's name and whether it is forward and backward."""
    return " ".join(filter(None, (case, FORWARD_BACKWARD * backward)))


def measure(
    operation: Operation, inputs: Callable, network: str, case: str, batch: int,
    implementation: str, device: torch.device, peak_rates: dict, stamp: dict, runs: int,
    warmup: int, backward: bool = False,
) -> tuple[results.KernelRow, list[float]]:  # fmt: skip
    """Check and time one implementation.

    Args:
        operation: What is called, and its reference.
        inputs: `inputs(device=...)` makes the arguments.
        network: Name of the network whose shape it is.
        case: Name of the shape.
        batch: Images.
        implementation: As `operations.implementation_of` takes it.
        device: Where it runs.
        peak_rates: Of the chip, as measured.
        stamp: Commit, build and what else every row carries.
        runs: Timed calls.
        warmup: Calls before them.
        backward: Whether to compute the gradients too, of trained arguments and activations, from
            random upstream gradients.

    Returns:
        The row, and its times in ms. Of a failure the row says why, and there are no times.
    """
    dtype = dtype_of(device)
    reference, exact = operation.reference, operation.exact
    call, served_by = implementation_of(operation.call, reference, implementation)
    shapes = []
    if backward:
        outputs = tensors(reference(**inputs(device="meta")))
        shapes = list(enumerate(y.shape for y in outputs))
        call, reference = both_ways(call), both_ways(reference)

    def make(device=device):
        upstream = {f"upstream_{i}": torch.randn(s, device=device) for i, s in shapes}
        return cast(inputs(device=device) | upstream, dtype)

    # no inference_mode: there, no tensor knows whose view it is
    with MODES["eager_fp32"].settings(), torch.no_grad():
        first = make()
        plain = reference(**first)
        read = first if operation.reads is None else first | operation.reads(first)
        moved, precision = traffic(read, plain, first, dtype, implementation)
        flops = flops_of(reference, make(device="meta"))
        least = predicted_ms(moved, flops, precision, peak_rates)
        figures = {
            "mode": implementation, "op": operation.name, "network": network,
            "case": case_name(case, backward), "batch": batch, "dtype": PRECISIONS[dtype],
            "runs": runs, "bytes": moved, "flops": flops, "predicted_ms": least, **stamp,
            "served_by": served_by or _served_by(operation.name, first, device),
        }  # fmt: skip
        try:
            figures["relative_error"] = agree(call(**first), plain, exact or reference, first)
            sets = timing.rotation(make, moved, device)
            times = timing.kernel_ms(lambda x: call(**x), sets, runs, warmup, device)
        except Exception as error:
            note = failure_note(error)
            return results.KernelRow(**figures, status="failed", note=note), []
        finally:
            torch.compiler.reset()
    typical = timing.summary(times)
    tflops, tb_per_s = (n / typical["ms_median"] / 1e9 for n in (flops, moved))
    row = results.KernelRow(
        **figures, **typical, tflops=tflops, tb_per_s=tb_per_s,
        fraction_of_peak_rate=least / typical["ms_median"] if device.type == "cuda" else None,
    )  # fmt: skip
    return row, times


def predicted_ms(moved: int, flops: int, precision: str, peak_rates: dict) -> float:
    """Milliseconds at the peak rates; by bytes alone where that of the precision is not known."""
    copied = moved / peak_rates["copy_tb_per_s"]
    return max(copied, flops / peak_rates.get(f"{precision}_tflops", math.inf)) / 1e9


def _served_by(op, inputs, device):
    if op in QUANTIZED:
        matmul = op == "quantized_linear"
        dtype = inputs["x"].values.dtype if matmul else FORMATS[inputs["format"]]
        capability = _chips.capability(device.type, device.index)
        return _policy.choose(op, capability, dtype).implementation
    x = next(t for t in tensors(inputs.values()) if t.is_floating_point())
    of = "linear" if op.startswith("layer_norm_") else op
    by_rule = _policy.resolve(of, x, "auto")
    if by_rule == "torch" or op not in ("linear", "attention"):
        return by_rule
    return tune.served_by(op, inputs)
