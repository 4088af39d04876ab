"""The predictions of docs/performance.md: batch 256, peak rates of chips.py, no tuned table."""

from benchmarks.table5 import DISTILLED as NETWORKS

from .chips import GPUS
from .model import case_of, full_flops, predict


def markdown() -> str:
    """A Markdown table: a column for each DeiT, lines for each chip."""
    lines = ["| | Ti | S | B | B-384 |", "|---|---:|---:|---:|---:|"]
    for gpu in GPUS.values():
        lines += _markdown(gpu)
    return "\n".join(lines)


def _markdown(gpu):
    lines = []
    limits = gpu.peak_rates
    found = {n: predict(n, 256, limits, tables=False, gpu=gpu) for n in NETWORKS}

    def line(name, value, form):
        cells = " | ".join(form.format(value(n)) for n in NETWORKS)
        lines.append(f"| {gpu.label}: {name} | {cells} |")

    for label, op, case in (
        ("qkv, LayerNorm folded, us", "layer_norm_linear", "qkv"),
        ("attention, us", "attention", ""),
        ("proj + residual, us", "linear", "proj"),
        ("fc1, folded, GELU, us", "layer_norm_linear", "fc1"),
        ("fc2 + residual, us", "linear", "fc2"),
    ):

        def of(network, op=op, case=case):
            (us,) = [
                times["predicted"]
                for launch, count, times in found[network][0]
                if count >= 10 and (launch.op, case_of(launch, network)) == (op, case)
            ]
            return us

        line(label, of, "{:.0f}")
    line("forward pass, us", lambda n: found[n][1], "{:,.0f}")
    line("images/s", lambda n: 256 / found[n][1] * 1e6, "{:,.0f}")

    def of_peak_rate(network):
        flops = 256 * full_flops(network)
        return flops / limits["bf16_tflops"] / 1e4 / found[network][1]

    line("of the matrix peak rate, full-model FLOPs", of_peak_rate, "{:.0f}%")
    return lines
