"""The steps of a lease, most valuable first. Data only: nothing heavy is imported for `--help`."""

from dataclasses import dataclass

SECONDS = 540.0  # of a whole run; budgets below are for this many


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: On the command line and in the rows.
        seconds: After which it begins nothing new.
        title: For a reader.
        target: "module:name" of a function `(ctx)`, or with parts `(ctx, part)`.
        parts: "module:name" of a function `(small)` that lists the parts. A part that crashes or
            hangs costs itself alone.
        exclusive: Whether background work is paused meanwhile, because something is timed.
    """

    name: str
    seconds: float
    title: str
    target: str
    parts: str | None = None
    exclusive: bool = True


HERE = "benchmarks.lease"
STEPS = (
    Step("smoke", 30, "every kernel family against PyTorch", f"{HERE}.smoke:step",
         f"{HERE}.smoke:groups", exclusive=False),
    Step("agreement", 30, "whole models, gradients, engine, batches in flight",
         f"{HERE}.agreement:step", f"{HERE}.agreement:parts", exclusive=False),
    Step("plans", 25, "launch plans against the same calls in Python", f"{HERE}.plans:step",
         f"{HERE}.plans:parts"),
    Step("peak_rates", 12, "peak rates: matmul by dtype, copy", f"{HERE}.peak_rates:step"),
    Step("tune", 40, "tiles and libraries for DeiT's GEMMs and attention", f"{HERE}.tuning:quick"),
    Step("throughput", 75, "images/s at batch 256", f"{HERE}.models:throughput",
         f"{HERE}.models:deits"),
    Step("compiled", 30, "torch.compile, as far as it is ready", f"{HERE}.compiled:step",
         f"{HERE}.compiled:parts"),
    Step("quantized", 45, "fp8 and int8", f"{HERE}.models:quantized", f"{HERE}.models:larger"),
    Step("training", 60, "forward + backward", f"{HERE}.models:training", f"{HERE}.models:deits"),
    Step("latency", 35, "batch 1, 8, 32", f"{HERE}.models:latency", f"{HERE}.models:deits"),
    Step("relatives", 35, "B-384, ViT-B/16, CaiT-S24, TinyViT-21M", f"{HERE}.models:relatives",
         f"{HERE}.models:others"),
    Step("sanitizer", 60, "compute-sanitizer memcheck", f"{HERE}.sanitize:step", exclusive=False),
    Step("compiled-more", 30, "torch.compile, what became ready since", f"{HERE}.compiled:step",
         f"{HERE}.compiled:parts"),
    Step("tune-more", 60, "the shapes that are left, and close comparisons again",
         f"{HERE}.tuning:rest"),
    Step("kernels", 600, "each kernel beside PyTorch's", f"{HERE}.kernels:step",
         f"{HERE}.kernels:parts"),
)  # fmt: skip
NAMES = tuple(step.name for step in STEPS)
