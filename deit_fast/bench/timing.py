"""Clocks, the rotation of inputs, and what the chip itself can do.

Throughput is timed with device events around each call and no synchronisation between calls, as in
a busy server; latency with the host's clock around one call and its synchronisation; a single
kernel through a CUDA graph, so that launches do not count. On a CPU the host's clock serves all.
"""

import gc
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median, quantiles

import torch

from deit_fast.kernels import _policy, _tuned
from deit_fast.kernels.quantize import FORMATS

from .modes import MODES

PEAK_RATE_RUNS = 20
GRAPH_MS = 1.0  # that one graph of a short kernel's calls should last
MOST_COPIES = 64
CLOCK_FIELDS = ("sm_mhz", "mem_mhz", "power_w", "temperature_c")


def device_name(device: torch.device) -> str:
    """The chip as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """The chip's folder under benchmarks/results: "h200", "cpu"."""
    if device.type == "cpu":
        return "cpu"
    return _tuned.slug(device_name(device))


def hardware(device: torch.device) -> dict:
    """What the figures were measured on and with. `gpu` is None on a CPU."""
    found = {"gpu": None, "driver": None, "cuda": torch.version.cuda}
    if device.type == "cuda":
        found |= {"gpu": device_name(device), "driver": _driver()}
    found |= {"cpu": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    found["python"] = platform.python_version()
    for package in ("torch", "triton", "timm", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return answer.splitlines()[0].strip()


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def has_bf16(device: torch.device) -> bool:
    """In hardware, on a GPU; a CPU computes anything, some of it slowly."""
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def l2_bytes(device: torch.device) -> int:
    """The cache that must not hold the inputs from one call to the next."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 32 << 20


def rotation(make: Callable[[], object], nbytes: int, device: torch.device) -> list:
    """Input sets to use in turn: together four times the cache, at most 64 of them."""
    return [make() for _ in range(min(64, max(1, -(-4 * l2_bytes(device) // max(nbytes, 1)))))]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory back: what no one holds any more, and what the allocator keeps of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def throughput_ms(
    call: Callable, inputs: Sequence, runs: int, warmup: int, device: torch.device
) -> list[float]:
    """Milliseconds of each of `runs` calls, one after the other without waiting."""
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
    """Milliseconds from each call to its result being there."""
    times = []
    for i in range(warmup + runs):
        synchronize(device)
        start = time.perf_counter()
        call(inputs[i % len(inputs)])
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times[warmup:]


def kernel_ms(
    call: Callable, inputs: Sequence, runs: int, warmup: int, device: torch.device
) -> list[float]:
    """Milliseconds of device time a call; each of `runs` is the mean over all input sets. A
    short kernel's calls are repeated until a graph lasts a millisecond: its launch takes some
    microseconds."""
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


def _captured(call, inputs):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    return graph


def latency_runs(ms: float, least: int = 30) -> int:
    """Timed calls of a latency row whose calls last `ms`: half a second's worth, at most 200."""
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


def last_sample(path: Path) -> dict:
    """The last whole line that `nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,
    temperature.gpu --format=csv,noheader,nounits` wrote to `path`, by CLOCK_FIELDS; None for what
    it does not tell."""
    unknown = dict.fromkeys(CLOCK_FIELDS)
    if not path.exists():
        return unknown
    *whole, _ = path.read_text(errors="replace").split("\n")
    if not whole:
        return unknown
    _, *values = [value.strip() for value in whole[-1].split(",")]
    if len(values) != len(CLOCK_FIELDS):
        return unknown
    return {name: _number(value) for name, value in zip(CLOCK_FIELDS, values, strict=True)}


def _number(text):
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, mean, 20th and 80th percentile of milliseconds."""
    fifths = quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    return {
        "ms_median": median(times), "ms_mean": fmean(times),
        "ms_p20": fifths[0], "ms_p80": fifths[3],
    }  # fmt: skip


def peak_rates(device: torch.device, runs: int = PEAK_RATE_RUNS) -> dict[str, float]:
    """The chip's best, measured on random data: a large copy, counting bytes read and written
    (copy_tb_per_s), and the best of several large matrix products in each precision, those in
    eight bits where the GPU has them; they are left out, with a warning, where PyTorch's library
    does not run them."""
    cuda, runs = device.type == "cuda", min(runs, PEAK_RATE_RUNS)
    found = {"copy_tb_per_s": _copy_tb_per_s(2 << 30 if cuda else 64 << 20, runs, device)}
    shapes = [(1024, 1024, 1024)] if not cuda else [
        (8192, 8192, 8192), (16384, 8192, 4096), (50_688, 3072, 768), (50_688, 768, 3072),
    ]  # fmt: skip
    for name in ("fp32", "tf32", "fp16", "bf16") if cuda else ("fp32", "fp16", "bf16"):
        mode = MODES[f"eager_{name}"]
        with mode.settings():
            best = max(_product_tflops(shape, mode.dtype, runs, device) for shape in shapes)
        found[f"{name}_tflops"] = best
    for name in formats(device) if cuda else ():
        try:
            best = max(_eight_bits_tflops(shape, name, runs, device) for shape in shapes)
        except torch.AcceleratorError:  # the device is lost: nothing would run after it
            raise
        except RuntimeError as error:  # every other figure stands without
            line = str(error).partition("\n")[0]
            warnings.warn(f"no peak rate of {name}: {line}", stacklevel=2)
        else:
            found[f"{name}_tflops"] = best
    release(device)
    return found


def formats(device: torch.device) -> list[str]:
    """Those of eight bits in which products are computed there."""
    of = None if device.type == "cpu" else capability(device)
    return [name for name in FORMATS if why_no_products(name, of) is None]


def why_no_products(format: str, of: tuple[int, int] | None) -> str | None:
    """Why a chip (None: a CPU) multiplies nothing in "fp8" or "int8", or None."""
    choice = _policy.choose("quantized_linear", of, FORMATS[format])
    return choice.reason if choice.implementation == "none" else None


def _copy_tb_per_s(size, runs, device):
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = throughput_ms(lambda _: target.copy_(source), [None], runs, 3, device)
    return 2 * size / median(times) / 1e9


def _product_tflops(shape, dtype, runs, device):
    M, N, K = shape
    a, b = (torch.randn(n, K, device=device).to(dtype) for n in (M, N))
    times = throughput_ms(lambda _: a @ b.T, [None], runs, 3, device)
    return 2 * M * N * K / median(times) / 1e9


def _eight_bits_tflops(shape, format, runs, device):
    """One scale for all, in fp8, results in bf16; in int8 the sums themselves, in int32: four bytes
    an element, which count where K is small."""
    M, N, K = shape
    if format == "int8":
        a, b = (torch.randint(-127, 128, (n, K), device=device).to(torch.int8) for n in (M, N))

        def product(_):
            return torch._int_mm(a, b.T)
    else:
        a, b = (torch.randn(n, K, device=device).to(FORMATS[format]) for n in (M, N))
        one = torch.ones((), device=device)

        def product(_):
            return torch._scaled_mm(
                a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=device.type == "cuda"
            )

    times = throughput_ms(product, [None], runs, 3, device)
    return 2 * M * N * K / median(times) / 1e9
