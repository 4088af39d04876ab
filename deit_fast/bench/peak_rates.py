"""The chip's peak rates, measured: a large copy, and large matmuls in each precision.

Rows of a GPU say which fraction of them they reach. Those of a CPU do not (`of_rows`): its clock
and what else it does change between a row and the peak rate, small operations find their data in
the cache, which is faster than any large copy, and deit_fast does less than the network's FLOPs
(the last block for the prefix tokens alone). Such a fraction was 125% to 192%.
"""

import warnings
from statistics import median

import torch

from deit_fast.kernels.quantize import FORMATS

from .device import quantized_formats
from .modes import MODES
from .timing import release, throughput_ms

PEAK_RATE_RUNS = 20
GPU_SHAPES = ((8192, 8192, 8192), (16384, 8192, 4096), (50_688, 3072, 768), (50_688, 768, 3072))
# The first alone, in fp32, is slower than larger ones; in fp16, which most CPUs convert, it is what
# ends in a second
CPU_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (1576, 768, 3072), (1576, 3072, 768))


def peak_rates(device: torch.device, runs: int = PEAK_RATE_RUNS) -> dict[str, float]:
    """Measure the chip's best rates on random data.

    A quantized format is left out, with a warning, where PyTorch's library does not run its matmul.

    Args:
        device: A GPU, or the CPU.
        runs: Timed calls of each, at most PEAK_RATE_RUNS; on a CPU at most five.

    Returns:
        copy_tb_per_s, of bytes read and written, in TB/s; <precision>_tflops, the best of several
        large matmuls in each precision, in TFLOP/s. The quantized ones on a GPU only. A GPU's are
        medians; a CPU's are the fastest calls', because other work on the machine slows the rest.

    Raises:
        torch.AcceleratorError: The device is lost.
    """
    cuda = device.type == "cuda"
    runs = min(runs, PEAK_RATE_RUNS if cuda else 5)
    found = {"copy_tb_per_s": _copy_tb_per_s(2 << 30 if cuda else 64 << 20, runs, device)}
    for name in ("fp32", "tf32", "fp16", "bf16") if cuda else ("fp32", "fp16", "bf16"):
        mode = MODES[f"eager_{name}"]
        shapes = GPU_SHAPES if cuda else CPU_SHAPES[:1] if name == "fp16" else CPU_SHAPES
        with mode.settings(), torch.inference_mode():
            best = max(_matmul_tflops(shape, mode.dtype, runs, device) for shape in shapes)
        found[f"{name}_tflops"] = best
    for name in quantized_formats(device) if cuda else ():
        try:
            best = max(_quantized_matmul_tflops(shape, name, runs, device) for shape in GPU_SHAPES)
        except torch.AcceleratorError:  # the device is lost: nothing would run after it
            raise
        except RuntimeError as error:  # every other figure stands without
            line = str(error).partition("\n")[0]
            warnings.warn(f"no peak rate of {name}: {line}", stacklevel=2)
        else:
            found[f"{name}_tflops"] = best
    release(device)
    return found


def of_rows(rates: dict[str, float], device: torch.device) -> dict[str, float]:
    """The peak rates that rows are compared with: a GPU's; of a CPU none."""
    return rates if device.type == "cuda" else {}


def _of(times: list[float], device: torch.device) -> float:
    return median(times) if device.type == "cuda" else min(times)


def _copy_tb_per_s(size: int, runs: int, device: torch.device) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = throughput_ms(lambda _: target.copy_(source), [None], runs, 3, device)
    return 2 * size / _of(times, device) / 1e9


def _matmul_tflops(
    shape: tuple[int, int, int], dtype: torch.dtype, runs: int, device: torch.device
) -> float:
    M, N, K = shape
    a, b = (torch.randn(n, K, device=device).to(dtype) for n in (M, N))
    times = throughput_ms(lambda _: a @ b.T, [None], runs, 3, device)
    return 2 * M * N * K / _of(times, device) / 1e9


def _quantized_matmul_tflops(
    shape: tuple[int, int, int], format: str, runs: int, device: torch.device
) -> float:
    """TFLOP/s of PyTorch's own quantized matmul.

    fp8 has per-tensor scales and results in bf16. int8 leaves its sums in int32, whose four bytes
    an element count where K is small.
    """
    M, N, K = shape
    if format == "int8":
        a, b = (torch.randint(-127, 128, (n, K), device=device).to(torch.int8) for n in (M, N))

        def matmul(_: None) -> torch.Tensor:
            return torch._int_mm(a, b.T)
    else:
        a, b = (torch.randn(n, K, device=device).to(FORMATS[format]) for n in (M, N))
        one = torch.ones((), device=device)

        def matmul(_: None) -> torch.Tensor:
            return torch._scaled_mm(
                a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=device.type == "cuda"
            )

    times = throughput_ms(matmul, [None], runs, 3, device)
    return 2 * M * N * K / _of(times, device) / 1e9
