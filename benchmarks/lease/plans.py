"""Launch plans against the same calls in Python: equal bits, and how long a call holds the host."""

import torch

from deit_fast.bench import timing
from deit_fast.bench.modes import MODES
from deit_fast.bench.step import Step
from deit_fast.bench.weights import random_images
from deit_fast.kernels import _plan_library
from deit_fast.layers import _plans

from . import agreement, models
from .context import Context

# mode, batch
CALLS = (
    ("deit_fast_bf16", 1), ("deit_fast_bf16", agreement.BATCH),
    ("deit_fast_amp_bf16_train", agreement.BATCH),
)  # fmt: skip
TIMED, TIMED_SMALL = 30, 3


def parts(small: bool) -> list[str]:
    """The networks."""
    return models.deits(small)


def step(ctx: Context, name: str) -> str:
    """Compare plans of one network with Python; returns both times, and what was not equal.

    Raises:
        RuntimeError: Something was not equal, or ran in Python.
    """
    if _plan_library.loaded is None:
        ctx.write("plans", network=name, status="unavailable", note=_plan_library.status())
        return f"unavailable, {_plan_library.status()}"
    network = models.network_of(name, ctx.device, ctx.small)
    said, failed = [], []
    for mode, batch in CALLS:
        if ctx.left() <= 0:
            break
        row = _compare(ctx, network, mode, min(batch, agreement.SMALL) if ctx.small else batch)
        said.append(f"{mode} {row['batch']}: {row['plan_ms']:.2f} ms, {row['python_ms']:.2f}")
        if row["note"]:
            failed.append(f"{mode}, batch {row['batch']}: {row['note']}")
    if failed:
        raise RuntimeError("; ".join(failed))
    return ", ".join(said)


def _compare(ctx, network, mode, batch):
    """One row: the outputs or gradients, and milliseconds until the call returns to the host."""
    runs = TIMED_SMALL if ctx.small else TIMED
    made = Step(network, MODES[mode])
    images = made.cast(random_images(batch, network.image_size, ctx.device, 5))
    with made.mode.settings():
        with _plans.in_python():
            expected = made.outputs(images)
            python_ms = timing.host_ms(made, [images], runs, ctx.device)
        for _ in range(2):  # noted, recorded
            made(images)
        before = _plan_library.loaded.runs()
        got = made.outputs(images)
        ran = _plan_library.loaded.runs() > before
        plan_ms = timing.host_ms(made, [images], runs, ctx.device)
    distance = max(map(_distance, got, expected))
    equal = distance == 0  # NaN is not
    note = "" if equal else f"differs from Python, by {distance:.1e}"
    if not ran:
        note = f"ran in Python: {_plans.why_not(made.model)}"
    ctx.write(
        "plans", network=network.label, mode=mode, batch=batch, python_ms=python_ms,
        plan_ms=plan_ms, status="failed" if note else "passed", note=note,
    )  # fmt: skip
    return {"batch": batch, "python_ms": python_ms, "plan_ms": plan_ms, "note": note}


def _distance(got, expected):
    """The largest difference; infinite where one of them is no number."""
    error = (got.double() - expected.double()).abs().max().item()
    return agreement.relative(error if error == error else torch.inf)
