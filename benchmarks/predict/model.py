"""The launches of one forward pass of a distilled DeiT, and their predicted times.

The launches are those of the model itself, run on the meta device as if on the chip: what is not
listed is not launched, and what is no kernel of deit_fast is named.
"""

from collections import Counter

import torch

import deit_fast
from benchmarks.table5 import DISTILLED as NETWORKS
from deit_fast.bench.launches import record
from deit_fast.kernels import _chips
from deit_fast.kernels.cases import DEIT

from .chips import H100, Gpu
from .costs import LEAST_US, Launch, launches

MODES = {  # format of `deit_fast.quantize` -> mode of the benchmarks whose time is the GPU's
    None: "deit_fast_engine_bf16", "fp8": "deit_fast_engine_fp8", "int8": "deit_fast_int8",
}  # fmt: skip


def measured_op(launch: Launch) -> str:
    """The operation that its benchmark calls."""
    return launch.op.removesuffix("_prologue")


def case_of(launch: Launch, network: str) -> str | None:
    """The case of benchmarks/bench_<op>.py that is this launch; None where it has none."""
    D = DEIT[network].D
    if launch.op.endswith(("linear", "linear_prologue")):
        wide, *kind = launch.shape.split(" -> ")[1].removesuffix(", gelu").split(", ")
        names = {3 * D: "qkv", 4 * D: "fc1", D: "proj" if launch.k == D else "fc2"}
        name = names.get(int(wide))
        return name and " ".join((*kind, name))
    if launch.op == "attention":
        return "" if ", 2 of" not in launch.shape else "last block"
    if launch.op == "attention_quantized" and ", 2 of" in launch.shape:
        return None
    if launch.op in ("quantize", "layer_norm_quantized", "attention_quantized"):
        return launch.shape.rpartition(", ")[2]
    if launch.op == "patch_embed":
        return "uint8 NHWC" if "uint8" in launch.shape else "float NCHW"
    return ""


def predict(
    network: str, batch: int, limits: dict, uint8: bool = False, tables: bool = True,
    format: str | None = None, attention: bool = False, gpu: Gpu = H100,
):  # fmt: skip
    """One forward pass.

    Args:
        network: Ti, S, B or B-384.
        batch: Images.
        limits: Peak rates, as `Gpu.peak_rates`.
        uint8: Images as bytes, NHWC.
        tables: Whether tuned tables choose; else the rules alone.
        format: Of `deit_fast.quantize`, "fp8" or "int8"; None for bf16.
        attention: Whether attention is in fp8 too.
        gpu: The chip.

    Returns:
        Rows of (launch, how many, times as of `Launch.times`), the total in microseconds, and
        PyTorch's own operations with their counts.
    """
    with torch.device("meta"), _chips.simulate_device(gpu.chip):
        model = getattr(deit_fast, NETWORKS[network])()
        if format is not None:
            deit_fast.quantize(model, format, attention=attention)
    recorder = record(model, batch, torch.bfloat16, gpu.chip, uint8, tables)
    counted = Counter(launches(recorder))
    rows = [(launch, count, launch.times(limits)) for launch, count in counted.items()]
    total = sum(count * times["predicted"] for _, count, times in rows)
    return rows, total + LEAST_US * sum(recorder.others.values()), recorder.others


def full_flops(network: str) -> int:
    """FLOPs of one image, with the whole of the last block."""
    D, _, N, size = DEIT[network]
    patches = (size // 16) ** 2
    return 2 * patches * 768 * D + 12 * (24 * N * D * D + 4 * N * N * D) + 4 * 1000 * D


def images_per_s(
    network: str, mode: str, batch: int, limits: dict, gpu: Gpu = H100
) -> float | None:  # fmt: skip
    """Predicted throughput of a distilled DeiT ("B") in a mode of the benchmarks.

    By the rules, whatever a tuned table chooses. None where there is no prediction: the mode's time
    is not the GPU's.
    """
    formats = {name: format for format, name in MODES.items()}
    if network not in NETWORKS or mode not in formats:
        return None
    format = formats[mode]
    return 1e6 * batch / predict(network, batch, limits, False, False, format, gpu=gpu)[1]


def kernel_ms(
    network: str, batch: int, limits: dict, format: str | None = None, gpu: Gpu = H100
) -> dict[tuple[str, str], float]:  # fmt: skip
    """Predicted milliseconds of one call by (operation, case of its benchmark), by the rules."""
    found = {}
    for launch, _, times in predict(network, batch, limits, False, False, format, gpu=gpu)[0]:
        case = case_of(launch, network)
        if case is not None:
            key = (measured_op(launch), case)
            found[key] = max(found.get(key, 0.0), times["predicted"] / 1e3)
    return found
