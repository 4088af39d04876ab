"""Clocks, and the rotation of inputs.

Throughput is timed with device events around each call and no synchronization between calls, as on
a busy server. Latency is timed with the host's clock around one call and its synchronization. A
single kernel is timed through a CUDA graph, so that launches do not count. On a CPU the host's
clock serves all of them.
"""

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median, quantiles
from typing import TypeVar

import torch

from .device import l2_bytes

GRAPH_MS = 1.0  # how long one graph of a short kernel's calls should last
MOST_COPIES = 64
T = TypeVar("T")


def rotation(make: Callable[[], T], nbytes: int, device: torch.device) -> list[T]:
    """Input sets to use in turn, so that no call finds its input in the cache.

    Args:
        make: Makes one input set.
        nbytes: The size of one set.
        device: Where the sets lie.

    Returns:
        Sets that together have four times the size of the cache, at most 64 of them.
    """
    return [make() for _ in range(min(64, max(1, -(-4 * l2_bytes(device) // max(nbytes, 1)))))]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free memory: unreachable tensors, and what the CUDA allocator caches."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def throughput_ms(
    call: Callable, inputs: Sequence, runs: int, warmup: int, device: torch.device
) -> list[float]:
    """Time calls that follow each other without waiting.

    Args:
        call: What is timed, with one argument.
        inputs: Arguments, used in turn.
        runs: How many calls are timed.
        warmup: How many calls are made before.
        device: Where the call computes.

    Returns:
        Milliseconds of each timed call.
    """
    if device.type != "cuda":
        return latency_ms(call, inputs, runs, warmup, device)
    for i in range(warmup):
        call(inputs[i % len(inputs)])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda.synchronize(device)
    for i, (start, end) in enumerate(events):
        start.record()
        call(inputs[i % len(inputs)])
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def latency_ms(
    call: Callable, inputs: Sequence, runs: int, warmup: int, device: torch.device
) -> list[float]:
    """Time each call until its result is there; arguments as of `throughput_ms`."""
    times = []
    for i in range(warmup + runs):
        synchronize(device)
        start = time.perf_counter()
        call(inputs[i % len(inputs)])
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times[warmup:]


def in_turn_ms(
    calls: Sequence[Callable], inputs: Sequence, runs: int, warmup: int, device: torch.device
) -> list[list[float]]:
    """Time several calls in turn, each until its result is there.

    What else the machine does then falls on all of them.

    Args:
        calls: What is timed, each with one argument.
        inputs: Arguments, used in turn: the next call never finds the last one's in the cache.
        runs: How many turns are timed.
        warmup: How many turns are made before.
        device: Where the calls compute.

    Returns:
        For each call, milliseconds of each timed turn.
    """
    following = itertools.cycle(inputs)
    turns = [
        [latency_ms(call, [next(following)], 1, 0, device)[0] for call in calls]
        for _ in range(warmup + runs)
    ]
    return [list(times) for times in zip(*turns[warmup:], strict=True)]


def kernel_ms(
    call: Callable, inputs: Sequence, runs: int, warmup: int, device: torch.device
) -> list[float]:
    """Time kernels on the device alone, by CUDA graph replay; arguments as of `throughput_ms`.

    The calls of a short kernel are repeated until a graph lasts a millisecond, because the launch
    of a graph takes some microseconds.

    Returns:
        Milliseconds of device time of one call; each of `runs` is the mean over all input sets.
    """
    if device.type != "cuda":
        return latency_ms(call, inputs, runs, warmup, device)
    for x in inputs:  # compiles, tunes and fills the allocator before the capture
        call(x)
    torch.cuda.synchronize(device)
    graph = _captured(call, inputs)
    (_, once) = throughput_ms(lambda _: graph.replay(), [None], 2, 1, device)
    repeats = copies(once)
    if repeats > 1:
        graph = _captured(call, list(inputs) * repeats)
    times = throughput_ms(lambda _: graph.replay(), [None], runs, warmup, device)
    return [t / (len(inputs) * repeats) for t in times]


def copies(ms: float) -> int:
    """How often calls that together last `ms` are repeated in one graph."""
    return max(1, min(MOST_COPIES, round(GRAPH_MS / max(ms, 1e-6))))


def _captured(call: Callable, inputs: Sequence) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    return graph


def latency_runs(ms: float, least: int = 30) -> int:
    """How many calls of a latency row are timed: half a second's worth, `least` to 200.

    Args:
        ms: How long one call lasts.
        least: The least number of calls; it may exceed 200.
    """
    return max(least, min(200, round(500 / max(ms, 1e-3))))


def spin_up(device: torch.device, seconds: float = 0.5) -> None:
    """Bring a GPU's clocks from idle to what they are under load."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize(device)


def host_ms(call: Callable, inputs: Sequence, runs: int, device: torch.device) -> float:
    """Median milliseconds until a call returns to the host, the device idle before each."""
    times = []
    for i in range(runs):
        synchronize(device)
        start = time.perf_counter()
        call(inputs[i % len(inputs)])
        times.append(1e3 * (time.perf_counter() - start))
    synchronize(device)
    return median(times)


def summary(times: Sequence[float]) -> dict[str, float]:
    """Summarize times in milliseconds.

    Returns:
        ms_median, ms_mean, and the 20th and 80th percentile as ms_p20 and ms_p80.
    """
    fifths = quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    return {
        "ms_median": median(times), "ms_mean": fmean(times),
        "ms_p20": fifths[0], "ms_p80": fifths[3],
    }  # fmt: skip
