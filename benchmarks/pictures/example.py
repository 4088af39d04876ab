"""Results that are made up, to show what the report looks like where nothing was measured.

The chip's name says so on every page and plot. The figures follow from the paper's V100 by one
factor a mode.
"""

from pathlib import Path

from benchmarks.measured import Chip
from benchmarks.table5 import ENTRIES, distinct
from deit_fast.bench.modes import MODES
from deit_fast.bench.results import KernelRow, ModelRow, Results

NAME = "example data, not measured"
SOURCE = {"commit": "example", "build": "example", "runs": 30}
RATES = {"copy_tb_per_s": 1.0, "fp32_tflops": 25.0, "bf16_tflops": 100.0}
FACTORS = {
    "eager_fp32": 1.0, "eager_bf16": 2.0, "compile_max_autotune_bf16": 2.5, "deit_fast_bf16": 3.0,
}  # fmt: skip
KERNELS = {"qkv": 200, "proj": 90, "fc1": 210, "fc2": 180}  # case of a GEMM -> FLOPs a byte


def chip() -> Chip:
    """A chip that is not there."""
    hardware = {"gpu": NAME, "driver": None, "cpu": "none", "threads": 1}
    protocol = {"runs": 30, "warmup": 10, "timer": "no clock"}
    rows = [*_models(), *_kernels()]
    found = Results(hardware, "example", "example", NAME, protocol, dict(RATES), rows)
    return Chip(Path("example"), {"table5": found})


def _models():
    for entry in distinct(list(ENTRIES)):
        for mode, factor in FACTORS.items():
            if MODES[mode].fast and entry.family == "convnet":
                continue
            for protocol, batch in (("batch", 256), ("latency", 1)):
                speed = factor * entry.v100_images_per_s / (1 if batch > 1 else 4)
                times = dict.fromkeys(("ms_median", "ms_mean"), 1e3 * batch / speed)
                yield ModelRow(
                    network=entry.network, timm_name=entry.timm_name, mode=mode, batch=batch,
                    image_size=entry.image_size, protocol=protocol, asked_batch=batch,
                    images_per_s=speed, channels_last=False, **times, **SOURCE,
                )  # fmt: skip


def _kernels():
    for i, (case, intensity) in enumerate(KERNELS.items()):
        for mode, share in (("fused", 0.7 - 0.05 * i), ("eager", 0.4)):
            roof = min(RATES["bf16_tflops"], intensity * RATES["copy_tb_per_s"])
            ms, tflops = 1 / share, roof * share
            yield KernelRow(
                op="linear", network="B", case=case, batch=256, dtype="bf16", mode=mode,
                served_by="example", flops=int(roof * 1e9), bytes=int(roof * 1e9 / intensity),
                ms_median=ms, tflops=tflops, predicted_ms=1.0, fraction_of_peak_rate=share,
                **SOURCE,
            )  # fmt: skip
