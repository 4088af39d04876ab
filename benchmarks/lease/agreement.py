"""Whole models on the device: logits, gradients, the engine, several batches in flight."""

import torch

import deit_fast
from deit_fast.bench import timing
from deit_fast.bench.correctness import relative_error
from deit_fast.bench.modes import MODES
from deit_fast.bench.step import Step
from deit_fast.bench.weights import random_images

from . import models
from .context import Context

BATCH, SMALL, IN_FLIGHT, TURNS = 16, 2, 6, 5
ROUNDING = 2.0**-8  # of bf16: the same kernels in another order of sums
# mode -> the eager mode of the same precision
FORWARD = {"deit_fast_bf16": "eager_bf16", "deit_fast_fp16": "eager_fp16"}
TRAINING = {"deit_fast_amp_bf16_train": "eager_amp_bf16_train"}


def parts(small: bool) -> list[str]:
    """The networks."""
    return models.deits(small)


def step(ctx: Context, name: str) -> str:
    """Compare one network in all that a user does with it; returns what did not match."""
    network = models.network_of(name, ctx.device, ctx.small)
    batch = SMALL if ctx.small else BATCH
    failed = []

    def write(what, dtype, error, pytorch, allowed):
        good = error <= allowed  # NaN is not
        note = "" if good else f"{error:.1e}, allowed {allowed:.1e}"
        ctx.write(
            "agreement", network=name, what=what, dtype=dtype, batch=batch,
            error=error if error == error else None, pytorch_error=pytorch,
            status="passed" if good else "failed", note=note,
        )  # fmt: skip
        if not good:
            failed.append(f"{what}: {note}")

    for what, pairs in (("logits", FORWARD), ("gradients", TRAINING)):
        for mode, eager in pairs.items():
            if network.why_not(MODES[mode]) is None and ctx.left() > 0:
                ours, pytorch = (_error(network, MODES[of], batch) for of in (mode, eager))
                write(what, MODES[mode].precision, ours, pytorch, 2 * pytorch + 1e-4)
    timing.release(ctx.device)
    if ctx.left() > 0:
        _engine(ctx, network, batch, write)
    return "; ".join(failed)


def _error(network, mode, batch):
    with mode.settings():
        return relative(relative_error(network, Step(network, mode), batch))


def _engine(ctx, network, batch, write):
    """The engine against the model's own call, and batches in flight from the host's memory."""
    mode = MODES["deit_fast_bf16"]
    model = Step(network, mode).model
    engine = deit_fast.InferenceEngine(model, batch, image_size=network.image_size)
    size, cuda = network.image_size, ctx.device.type == "cuda"
    batches = []
    for seed in range(IN_FLIGHT):
        images = random_images(batch, size, torch.device("cpu"), 10 + seed).bfloat16()
        batches.append(images.pin_memory() if cuda else images)
    with torch.inference_mode():
        expected = [model(images.to(ctx.device)).float() for images in batches]
    got = engine(batches[0].to(ctx.device))
    write("engine is the eager call", "bf16", _distance(got, expected[0]), 0.0, ROUNDING)
    worst = 0.0
    for _ in range(TURNS):  # nothing waits between the calls: a data race would mix batches
        outputs = [engine(images) for images in batches]
        worst = max(worst, *(_distance(a, w) for a, w in zip(outputs, expected, strict=True)))
    write(f"{IN_FLIGHT} batches in flight", "bf16", worst, 0.0, ROUNDING)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(values) * 255 for values in (engine.mean, engine.std))
    floats = ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous().bfloat16()
    error = _distance(engine(pixels), engine(floats).float())
    write("bytes are the floats", "bf16", error, 0.0, 5e-2)


def _distance(got, expected):
    return relative(((got.float() - expected).norm() / expected.norm()).item())


def relative(error: float) -> float:
    """The error as it is; a rehearsal whose kernels do not run puts 0 in its place."""
    return error
