"""One measured row: a network in one mode by one protocol, and the largest batch that fits."""

import contextlib
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deit_fast._names import PROTOCOLS as PROTOCOLS

from .correctness import check, check_update
from .failures import failure_note
from .modes import TRAIN, Mode
from .network import Network
from .results import ModelRow
from .step import Step
from .timing import in_turn_ms, latency_ms, latency_runs, release, rotation, summary, throughput_ms

PAPER_SECONDS = 3.0  # of timed calls: in fp32 a batch of 2048 takes seconds
FEWEST = 5  # calls that are timed however long they take


class TooSlow(RuntimeError):
    """The timed calls would take longer than the plan has."""


@dataclass(frozen=True)
class Plan:
    """How a row is measured.

    Attributes:
        protocol: One of PROTOCOLS, as `results.ModelRow` describes them.
        batch: Images; of "paper" the cap of the search.
        runs: Timed calls.
        warmup: Calls before them.
        seconds: How long the timed calls may take; if longer, the row is not measured.
        timed_seconds: Of timed calls that are enough: FEWEST or more of `runs` last no longer.
        in_turn: Whether the mode's eager mode is timed in turn with it. The row then has `baseline`
            and `speedup`, on which other work on the machine does not fall unevenly. For modes of
            the same dtype, switches and layout as their eager mode.
    """

    protocol: str = "batch"
    batch: int = 256
    runs: int = 30
    warmup: int = 10
    seconds: float = float("inf")
    timed_seconds: float = float("inf")
    in_turn: bool = False


def measure(
    network: Network, mode: Mode, plan: Plan, peak_rates: dict[str, float], stamp: dict[str, str]
) -> tuple[ModelRow, list[float]]:
    """Measure one row; a batch that is too large for memory is halved.

    Args:
        network: What is measured.
        mode: In which mode.
        plan: How.
        peak_rates: The chip's, of `peak_rates.peak_rates`.
        stamp: The row's `commit` and `build`.

    Returns:
        The row and its single times in ms. Where the mode's outputs mismatch, or it does not run,
        or the network does not have it here, the row says so and there are no times.

    Raises:
        ValueError: The protocol has an optimizer and the mode does not train; or the plan is in
            turn with the eager mode, and this is one or trains.
        TooSlow: The calls would take longer than the plan's seconds.
    """
    if plan.protocol == "step" and not mode.train:
        raise ValueError(f"mode: {mode.name} by protocol step, expected one that ends in {TRAIN}")
    if plan.in_turn and (mode.eager == mode or mode.train):
        raise ValueError(f"mode: {mode.name} in turn, expected a forward mode that is not eager")
    row: dict[str, Any] = {
        "network": network.label, "timm_name": network.timm_name,
        "image_size": network.image_size, "mode": mode.name, "protocol": plan.protocol,
        "asked_batch": plan.batch, "runs": plan.runs,
        "channels_last": network.channels_last(mode), **stamp,
    }  # fmt: skip
    missing = network.why_not(mode)
    if missing:
        return ModelRow(**row, batch=plan.batch, status="unavailable", note=missing), []
    with mode.settings():
        batch, note = plan.batch, None
        while True:
            try:
                if plan.protocol == "paper" and note is None:
                    batch, note = largest_batch(network, mode, plan.batch)
                times, figures = _timed(network, mode, batch, plan)
                break
            except torch.OutOfMemoryError:
                note = f"batch {batch} does not fit in memory"
            except TooSlow:
                raise
            except Exception as error:  # that a baseline does not run is a finding
                note = failure_note(error)
                return ModelRow(**row, batch=batch, status="failed", note=note), []
            finally:
                _clean_up(network.device)
            if batch == 1:
                return ModelRow(**row, batch=1, status="failed", note=note), []
            batch //= 2
    fewer = f"{len(times)} calls timed" if len(times) < plan.runs else None
    note = "; ".join(filter(None, (note, figures.pop("skipped"), fewer))) or None
    figures |= summary(times)
    images_per_s = 1e3 * batch / figures["ms_mean" if plan.protocol == "paper" else "ms_median"]
    tflops = images_per_s * network.flops * (3 if mode.train else 1) / 1e12
    peak_rate = peak_rates.get(f"{mode.precision}_tflops")
    return ModelRow(
        **row, **figures, batch=batch, note=note, images_per_s=images_per_s, tflops=tflops,
        fraction_of_peak_rate=tflops / peak_rate if peak_rate else None,
    ), times  # fmt: skip


def _timed(
    network: Network, mode: Mode, batch: int, plan: Plan
) -> tuple[list[float], dict[str, Any]]:
    """Check and time one step: its times in ms, and its error, memory and skipped layers."""
    device = network.device
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    step = Step(network, mode, optimize=plan.protocol == "step")
    images = step.cast(network.batch(batch))
    step(images)  # compiles, captures, makes the optimizer's state
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    step(images)  # torch.compile records its graph; from here on it is what will be timed
    # the step's own: without the network that it was copied from
    peak_gb = (torch.cuda.max_memory_allocated(device) - before) / 1e9 if cuda else None
    if step.engine is not None and peak_gb is not None:
        # what an engine's graphs hold counts as free between their runs
        peak_gb += step.engine.memory.workspace / 1e9
    if step.optimizer is not None:
        check_update(network, step, images)
    error = check(network, step, batch)
    (one,) = latency_ms(step, [images], 1, 0, device)
    if one * (plan.warmup + plan.runs) > 1e3 * plan.seconds:
        raise TooSlow(f"{one / 1e3:.1f} s a call, {plan.seconds:.0f} s left")
    nbytes = images.nbytes
    del images  # the largest batch that fits leaves no room for another

    def make() -> Tensor:
        images = step.cast(network.batch(batch))
        on_host = plan.protocol == "host" and cuda
        return images.cpu().pin_memory() if on_host else images

    inputs = rotation(make, nbytes, device)
    figures = {"relative_error": error, "peak_memory_gb": peak_gb, "skipped": step.skipped}
    runs = timed_calls(plan, one)
    if plan.in_turn:
        eager = Step(network, mode.eager)
        eager(inputs[0])  # as warm as the other
        base, times = in_turn_ms((eager, step), inputs, runs, plan.warmup, device)
        speedup = median(b / t for b, t in zip(base, times, strict=True))
        return times, figures | {"baseline": mode.eager.name, "speedup": speedup}
    clock = latency_ms if plan.protocol == "latency" else throughput_ms
    return clock(step, inputs, runs, plan.warmup, device), figures


def timed_calls(plan: Plan, ms: float) -> int:
    """How many calls are timed, of a call that lasts `ms` milliseconds.

    Slow calls are timed for the plan's `timed_seconds`, those of the paper's protocol for
    PAPER_SECONDS; and short calls of a latency row more often than the plan says.
    """
    if plan.protocol == "latency":
        return latency_runs(ms, plan.runs)
    seconds = min(plan.timed_seconds, PAPER_SECONDS if plan.protocol == "paper" else float("inf"))
    enough = min(float(plan.runs), 1e3 * seconds / max(ms, 1e-3))
    return max(min(plan.runs, FEWEST), round(enough))


def _clean_up(device: torch.device) -> None:
    torch.compiler.reset()
    with contextlib.suppress(RuntimeError):  # a device that is lost stays lost
        release(device)


def largest_batch(network: Network, mode: Mode, cap: int) -> tuple[int, str]:
    """Find the largest batch of which one uncompiled step fits in memory, by doubling from 1.

    Returns:
        A power of two, or `cap` itself; and what ended the search.
    """
    batch, fits = 1, 0
    step = Step(network, mode, compiled=False)
    while fits < cap:
        batch = min(batch, cap)
        if not _fits(network, step, batch):
            return max(fits, 1), f"largest that fits: {batch} does not"
        fits, batch = batch, 2 * batch
    return fits, f"capped at {cap}"


def _fits(network: Network, step: Step, batch: int) -> bool:
    try:
        step(step.cast(network.batch(batch)))
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    step.model.zero_grad(set_to_none=True)
    release(network.device)  # outside the handler: its traceback holds the step's tensors
    return fits
