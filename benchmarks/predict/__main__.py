"""What one forward pass should take on an H100 or H200, kernel by kernel, and what it took.

    python -m benchmarks.predict                        DeiT-Ti, S, B and B-384 at batch 256
    python -m benchmarks.predict --chip h200 --network S --batch 64
    python -m benchmarks.predict --format fp8           quantized, and how many times bf16 that is

The launches are those of the model itself, run on the meta device as if on the chip: what is not
listed is not launched, and what is no kernel of deit_fast is named. A launch is predicted to take
the longer of its arithmetic (at a share of the measured matrix peak rate that grows with K; for
quantized operands the peak rate is twice as high, and K counts half) and its traffic (at 90% of
the measured copy), and half of its epilogue's instructions, the other half being hidden by the
second CTA of an SM. Peak rates are those of benchmarks/results/<chip> where that is there, else
another such chip's (chips.py). Nothing here is a measurement but what stands under "measured".
"""

import argparse
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measured import Chip as Measured
from benchmarks.table5 import DISTILLED as NETWORKS
from benchmarks.table5 import ENTRIES
from deit_fast.kernels.quantize import FORMATS

from .chips import GPUS, H100, Gpu
from .model import MODES, case_of, measured_op, predict
from .table import markdown

RESULTS = Path(__file__).parents[1] / "results"


def peak_rates(gpu: Gpu = H100) -> tuple[dict, str]:
    """The peak rates of a chip, and where they are from."""
    path = RESULTS / gpu.slug
    if (path / "peak_rates.json").exists():
        measured = Measured.read(path)
        return measured.peak_rates, f"measured here, {measured.newest.date}"
    return gpu.peak_rates, f"measured on another {gpu.label}"


def measured_rows(batch: int, mode: str, gpu: Gpu = H100) -> tuple[dict, dict]:
    """What was measured in that mode of the benchmarks.

    Returns:
        Microseconds of the kernels by (op, network, case), and images/s of the models by network.
    """
    path = RESULTS / gpu.slug
    if not path.exists():
        return {}, {}
    chip = Measured.read(path)
    kernels = {
        (r.op, r.network, r.case): 1e3 * r.ms_median
        for r in chip.kernels
        if r.mode == "fused" and r.batch == batch and r.ms_median
    }
    models = {}
    for entry in ENTRIES:
        short = entry.network.removeprefix("DeiT-").removesuffix(" distilled")
        row = chip.row(entry, mode, "batch", batch)
        if entry.network.endswith(" distilled") and row and row.images_per_s:
            models[short] = row.images_per_s
    return kernels, models


def show(
    network: str, batch: int, console: Console, uint8: bool, format: str | None = None,
    attention: bool = False, gpu: Gpu = H100,
) -> None:  # fmt: skip
    """Print the launches of one network with their predicted and measured times."""
    limits, source = peak_rates(gpu)
    mode = "deit_fast_fp8_attention" if attention else MODES[format]
    kernels, models = measured_rows(batch, mode, gpu)
    rows, total, others = predict(network, batch, limits, uint8, True, format, attention, gpu)
    kind = (format or "bf16") + ", attention too" * attention
    title = (
        f"DeiT-{network} distilled, {kind}, batch {batch}, {gpu.label}: "
        f"{limits['bf16_tflops']:.0f} TFLOP/s, {limits['copy_tb_per_s']:.1f} TB/s ({source})"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("kernel")
    table.add_column("shape")
    for name in ("calls", "GFLOP", "MB", "arithmetic us", "traffic us", "epilogue us",
                 "predicted us", "measured us"):  # fmt: skip
        table.add_column(name, justify="right")
    for launch, count, times in rows:
        clock = kernels.get((measured_op(launch), network, case_of(launch, network)))
        figures = [f"{times[t]:.1f}" for t in ("arithmetic", "traffic", "epilogue", "predicted")]
        table.add_row(
            launch.op, launch.shape, str(count), f"{launch.flops / 1e9:.1f}",
            f"{launch.bytes / 1e6:.0f}", *figures, "-" if clock is None else f"{clock:.1f}",
        )  # fmt: skip
    console.print(table)
    clock = models.get(network)
    flops = sum(count * launch.flops for launch, count, _ in rows)
    shares = Counter()
    for launch, count, times in rows:
        shares[launch.op] += count * times["predicted"] / total
    console.print(
        f"forward pass: {total:.0f} us predicted, {batch / total * 1e6:,.0f} images/s; "
        f"measured: {'not yet' if clock is None else f'{clock:,.0f} images/s'}; "
        f"{flops / 1e9:.0f} GFLOP, at bf16's peak rate {flops / limits['bf16_tflops'] / 1e6:.0f} us"
    )
    if format is not None:
        plain = predict(network, batch, limits, uint8, gpu=gpu)[1]
        console.print(
            f"in bf16: {plain:.0f} us predicted, {batch / plain * 1e6:,.0f} images/s; "
            f"{kind}: {plain / total:.2f} times that"
        )
    console.print("shares: " + ", ".join(f"{op} {100 * s:.0f}%" for op, s in shares.most_common()))
    named = ", ".join(f"{count} x {name}" for name, count in others.items()) or "none"
    console.print(f"operations of PyTorch's own: {named}\n")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--chip", choices=GPUS, default="h100", help="(default: %(default)s)")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--markdown", action="store_true", help="docs/performance.md's table")
    parser.add_argument("--uint8", action="store_true", help="images as bytes, NHWC")
    parser.add_argument("--format", choices=FORMATS, help="of a quantized model, beside bf16")
    parser.add_argument("--attention", action="store_true", help="attention in fp8 too")
    args = parser.parse_args(argv)
    if args.attention and args.format != "fp8":
        parser.error("--attention: expected --format fp8 with it")
    if args.batch < 1:
        parser.error(f"--batch: {args.batch}, expected 1 or more")
    if args.markdown:
        print(markdown())
        return
    console = Console(width=160)
    for network in args.network:
        show(network, args.batch, console, args.uint8, args.format, args.attention, GPUS[args.chip])


if __name__ == "__main__":
    main()
