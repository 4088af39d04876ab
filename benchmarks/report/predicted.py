"""What the README says before a GPU was measured: predictions, each cell marked as one."""

from benchmarks.predict.chips import H100
from benchmarks.predict.model import images_per_s
from benchmarks.table5 import DISTILLED

BATCH = 256
MODES = {"bf16": "deit_fast_engine_bf16", "FP8": "deit_fast_engine_fp8"}


def predicted_table() -> str:
    """Images/s of the distilled DeiTs on an H100, in Markdown; "predicted" stands in each cell."""
    rates = H100.peak_rates
    title = (
        f"deit_fast has not been measured on a GPU yet. Predicted for an {H100.label}, images/s, "
        f"batch {BATCH}, from each launch's FLOPs and bytes at {rates['bf16_tflops']:.0f} TFLOP/s "
        f"(a plain bf16 matmul) and {rates['copy_tb_per_s']:.1f} TB/s (a plain copy), both "
        f"measured on an {H100.label} (`python -m benchmarks.predict`):"
    )
    lines = ["| network | " + " | ".join(MODES) + " |", "|---|" + "---:|" * len(MODES)]
    for network in DISTILLED:
        speeds = (images_per_s(network, mode, BATCH, rates) for mode in MODES.values())
        cells = " | ".join(f"{speed:,.0f} predicted" for speed in speeds)
        lines.append(f"| DeiT-{network} distilled | {cells} |")
    return "\n".join([title, "", *lines])
