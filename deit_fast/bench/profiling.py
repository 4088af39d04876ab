"""Where one call spends its time, by kind of kernel."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from .modes import MODES
from .network import Network
from .results import ModelRow
from .step import Step
from .timing import release, synchronize

FOREIGN = "not deit_fast's"  # the share of kernels that are not ours, of every kind
_OURS = re.compile(
    r"^_((linear|quantized_linear|quantize|attention|attention_resident|layer_norm"
    r"|layer_norm_mlp|layer_norm_linear|patch_embed|classifier|distillation_loss|column_sums"
    r"|sparse_cross_entropy|linear_epilogue|fold_layer_norm|fold_pixels|row_stats"
    r"|layer_norm_backward|linear_backward|attention_backward|talking_heads(_dq|_dkv)?"
    r"|window_attention(_backward|_scores|_biases)?|depthwise_conv|fold_batch_norm)_kernel)"
)
KINDS = ("GEMM", "attention", "norm", "elementwise", "copies", "idle")
# the first that matches a kernel's name (GPU) or an operator's (CPU)
_NAMES = (
    ("GEMM", r"^triton_tem|layer_norm_(mlp|linear)"),
    ("norm", r"^triton_(per|red|poi)\w*norm"),  # Inductor's fusions name what they hold
    ("elementwise", r"^triton_(per|red|poi)"),
    ("copies", r"memcpy|memset|copy|nchwToNhwc|nhwcToNchw|catarray|::cat\b|::contiguous|::clone"
     r"|::_to_copy|transpose"),
    ("attention", r"attention|talking_heads|flash|fmha|softmax|sdpa|bmm"),
    ("norm", r"(layer|batch|group)_?norm|^_row_stats|bn_fw|bn_bw"),
    ("GEMM", r"gemm|cutlass|cublas|nvjet|xmma|conv|::(add)?mm|_(scaled|int)_mm|linear_kernel"
     r"|patch_embed|classifier|fprop|dgrad|wgrad|winograd|implicit|mkldnn"),
)  # fmt: skip


def kind(name: str) -> str:
    """The kind of a kernel (GPU) or an operator (CPU), one of KINDS, by its name."""
    for found, pattern in _NAMES:
        if re.search(pattern, name, re.IGNORECASE):
            return found
    return "elementwise"


def profile(call: Callable[[], object], device: torch.device, trace: Path) -> dict[str, float]:
    """Profile one warm call.

    Args:
        call: What is profiled.
        device: Where it computes.
        trace: Where its trace for chrome://tracing is written; the folder is made.

    Returns:
        Milliseconds of each of KINDS. "idle" is the device's time between its first and its last
        kernel in which none runs; on a CPU, the time outside operators. On a GPU also FOREIGN,
        which the kinds contain.

    Raises:
        RuntimeError: The profiler saw no kernel.
    """
    for _ in range(3):
        call()
    synchronize(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        synchronize(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    events = list(profiler.events())
    if device.type == "cuda":
        events = [
            e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation
        ]
        if not events:
            raise RuntimeError("the profiler saw no kernel; is another profiler running?")
        return _shares([(e.name, e.time_range.start, e.time_range.end) for e in events])
    shares = dict.fromkeys(KINDS, 0.0)
    for e in events:
        shares[kind(e.name)] += e.self_cpu_time_total / 1e3
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    shares["idle"] = max(0.0, span / 1e3 - sum(shares.values()))
    return shares


def _shares(kernels: list[tuple[str, float, float]]) -> dict[str, float]:
    """Milliseconds by kind of kernels (name, start, end), in us.

    Where two kernels overlap, the time counts for the earlier one.
    """
    shares = dict.fromkeys((*KINDS, FOREIGN), 0.0)
    busy_until: float | None = None
    for name, start, end in sorted(kernels, key=lambda k: k[1]):
        if busy_until is None:
            busy_until = start
        shares["idle"] += max(0.0, start - busy_until) / 1e3
        alone = max(0.0, end - max(start, busy_until)) / 1e3
        shares[kind(name)] += alone
        shares[FOREIGN] += 0.0 if _OURS.match(name) else alone
        busy_until = max(busy_until, end)
    return shares


def profile_row(
    network: Network, row: ModelRow, folder: Path
) -> tuple[str, dict[str, float], Path]:
    """Profile a measured row's step once.

    Args:
        network: Of the row.
        row: What was measured.
        folder: Where the trace is written.

    Returns:
        A title, milliseconds by kind, and the path of the trace.
    """
    mode = MODES[row.mode]
    full = row.protocol == "step"
    trace = folder / f"{row.timm_name}-{row.mode}{'-step' * full}-{row.batch}.json.gz"
    with mode.settings():
        step = Step(network, mode, optimize=full)
        images = step.cast(network.batch(row.batch))
        milliseconds = profile(lambda: step(images), network.device, trace)
    torch.compiler.reset()
    release(network.device)
    title = f"{row.network}, {row.mode}{', full step' * full}, batch {row.batch}"
    return title, milliseconds, trace
