"""One row of a network, with few calls and made-up peak rates."""

import torch

from deit_fast.bench.measure import Plan, measure
from deit_fast.bench.modes import MODES

CPU = torch.device("cpu")
STAMP = {"commit": "unknown", "build": "0" * 12}
PEAK_RATES = {"fp32_tflops": 1.0, "bf16_tflops": 2.0, "copy_tb_per_s": 1.0, "fp8_tflops": 4.0}
ONE = Plan("batch", batch=3, runs=2, warmup=1)
STEP = Plan("step", batch=3, runs=2, warmup=1)


def measure_row(network, mode, plan=ONE):
    """(row, times) of a mode, by its name."""
    return measure(network, MODES[mode], plan, PEAK_RATES, STAMP)
