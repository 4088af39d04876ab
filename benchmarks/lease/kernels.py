"""DeiT's kernels one by one, in turn with PyTorch's operators: for comparison with predictions."""

from dataclasses import asdict, replace

from benchmarks import kernel_rows
from benchmarks.operations import NO_BACKWARD, OPS, operations
from deit_fast.bench import timing
from deit_fast.bench.failures import LOST
from deit_fast.bench.modes import PRECISIONS
from deit_fast.kernels.cases import deit_cases

from . import models
from .context import Context, NotReady
from .smoke import BACKWARD

DEIT_OPS = OPS[:8]
RUNS, WARMUP = 10, 3
BASELINE, OURS = "eager", "fused"


def parts(small: bool) -> list[str]:
    """Networks, each forward, then each forward and backward."""
    names = ["Ti"] if small else ["B", "S", "Ti"]
    return [*names, *(name + BACKWARD for name in names)]


def step(ctx: Context, part: str) -> str:
    """Time every operation of a network in one direction.

    Raises:
        NotReady: The peak rates, of which a kernel's rate is a fraction, were not measured.
    """
    network, backward = part.removesuffix(BACKWARD), part.endswith(BACKWARD)
    peak_rates = {row["name"]: row["value"] for row in ctx.rows("peak_rate")}
    if "copy_tb_per_s" not in peak_rates:
        raise NotReady("the peak rates were not measured")
    stamp = models.stamp(ctx)
    there = {
        (r["op"], r["network"], r["case"], r["dtype"], r["mode"])
        for r in ctx.rows("kernel")
        if r["build"] == stamp["build"] and r["status"] != "failed"
    }
    batch = models.SMALL_BATCH if ctx.small else models.BATCH
    dtype = PRECISIONS[kernel_rows.dtype_of(ctx.device)]
    timing.spin_up(ctx.device)
    slower = []
    for op in DEIT_OPS:
        for operation in operations(op) if not backward or op not in NO_BACKWARD else ():
            for label, case in deit_cases(op, network, batch).items():
                name = kernel_rows.case_name(label, backward)
                if (operation.name, network, name, dtype, OURS) in there:
                    continue
                if ctx.left() <= 0:
                    return _said(slower)
                speedup = _pair(
                    ctx, operation, network, label, case, batch, backward, stamp, peak_rates
                )
                if speedup is not None and speedup < 1:
                    slower.append(f"{operation.name} {label}".strip())
    return _said(slower)


def _said(slower):
    return f"slower than PyTorch: {', '.join(slower)}" if slower else ""


def _pair(ctx, operation, network, label, case, batch, backward, stamp, peak_rates):
    """PyTorch's row, and ours with its speedup, which is returned; None where one failed."""

    def inputs(device):
        return operation.inputs(**case, device=device)

    eager = None
    for implementation in (BASELINE, OURS):
        row, _ = kernel_rows.measure(
            operation, inputs, network, label, batch, implementation, ctx.device, peak_rates, stamp,
            2 if ctx.small else RUNS, WARMUP, backward,
        )  # fmt: skip
        if implementation == OURS and row.ms_median and eager:
            row = replace(row, baseline=BASELINE, speedup=eager / row.ms_median)
        eager = row.ms_median
        ctx.write("kernel", **asdict(row))
        if (row.note or "").startswith(LOST):
            raise RuntimeError(row.note)
    return row.speedup
