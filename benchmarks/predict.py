"""What one forward pass should take on an H100 or H200, kernel by kernel, and what it took where
measured.

    python -m benchmarks.predict                        DeiT-Ti, S, B and B-384 at batch 256
    python -m benchmarks.predict --chip h200 --network S --batch 64
    python -m benchmarks.predict --format fp8           quantised, and how many times bf16 that is

The launches are those of the model itself, run on the meta device as if on the chip: what is not
listed is not launched, and what is no kernel of deit_fast is named. A launch is predicted to take
the longer of its arithmetic (at a share of the measured matrix peak rate that grows with K; of
operands in eight bits the peak rate is twice as high, and K counts half) and its
traffic (at 90% of the measured copy), and half of its epilogue's instructions, the other half being
hidden by the second program on a multiprocessor. Peak rates are those of benchmarks/results/<chip>
where that is there, else another such chip's (chips.py). Nothing here is a measurement but what
stands under "measured".
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import deit_fast
from benchmarks.chips import GPUS, H100, Gpu
from benchmarks.costs import LEAST_US, Launch, launches
from benchmarks.measured import Chip as Measured
from benchmarks.table5 import DISTILLED as NETWORKS
from benchmarks.table5 import ENTRIES
from deit_fast.bench.launches import record
from deit_fast.kernels import _chips
from deit_fast.kernels.cases import DEIT
from deit_fast.kernels.quantize import FORMATS

RESULTS = Path(__file__).with_name("results")
MEASURED_AS = {
    None: "deit_fast_engine_bf16", "fp8": "deit_fast_engine_fp8", "int8": "deit_fast_int8",
}  # fmt: skip


def peak_rates(gpu: Gpu = H100) -> tuple[dict, str]:
    """Of the chip, and where they are from."""
    path = RESULTS / gpu.slug
    if (path / "peak_rates.json").exists():
        measured = Measured.read(path)
        return measured.peak_rates, f"measured here, {measured.newest.date}"
    return gpu.peak_rates, f"measured on another {gpu.label}"


def measured_rows(batch: int, mode: str, gpu: Gpu = H100) -> tuple[dict, dict]:
    """{(op, network, case): microseconds} of the kernels and {network: images/s} of the models in
    that mode of the benchmarks."""
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


def case_of(launch: Launch, network: str) -> str | None:
    """The case of benchmarks/bench_<op>.py that is this launch; None: it has none."""
    D = DEIT[network].D
    if launch.op in ("linear", "layer_norm_linear", "quantized_linear"):
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
    """(rows of (launch, count, times), total microseconds, operations of PyTorch's own). format,
    attention: of `deit_fast.quantize`."""
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
    """Of one image, with the whole of the last block."""
    D, _, N, size = DEIT[network]
    patches = (size // 16) ** 2
    return 2 * patches * 768 * D + 12 * (24 * N * D * D + 4 * N * N * D) + 4 * 1000 * D


def markdown() -> str:
    """The table of docs/performance.md: batch 256, peak rates of chips.py, no tuned table."""
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
    line("one pass, us", lambda n: found[n][1], "{:,.0f}")
    line("images/s", lambda n: 256 / found[n][1] * 1e6, "{:,.0f}")

    def of_peak_rate(network):
        flops = 256 * full_flops(network)
        return flops / limits["bf16_tflops"] / 1e4 / found[network][1]

    line("of the matrix peak rate, full-model FLOPs", of_peak_rate, "{:.0f}%")
    return lines


def images_per_s(
    network: str, mode: str, batch: int, limits: dict, gpu: Gpu = H100
) -> float | None:  # fmt: skip
    """Of a distilled DeiT ("B") in a mode of the benchmarks whose time is the GPU's, by the rules,
    whatever a tuned table chooses; None: there is no prediction."""
    formats = {name: format for format, name in MEASURED_AS.items()}
    if network not in NETWORKS or mode not in formats:
        return None
    format = formats[mode]
    return 1e6 * batch / predict(network, batch, limits, False, False, format, gpu=gpu)[1]


def kernel_ms(
    network: str, batch: int, limits: dict, format: str | None = None, gpu: Gpu = H100
) -> dict[tuple[str, str], float]:  # fmt: skip
    """{(operation, case of its benchmark): milliseconds of one call} of a distilled DeiT's pass, by
    the rules."""
    found = {}
    for launch, _, times in predict(network, batch, limits, False, False, format, gpu=gpu)[0]:
        case = case_of(launch, network)
        if case is not None:
            key = (launch.op, case)
            found[key] = max(found.get(key, 0.0), times["predicted"] / 1e3)
    return found


def show(
    network: str, batch: int, console: Console, uint8: bool, format: str | None = None,
    attention: bool = False, gpu: Gpu = H100,
) -> None:  # fmt: skip
    limits, source = peak_rates(gpu)
    mode = "deit_fast_fp8_attention" if attention else MEASURED_AS[format]
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
        clock = kernels.get((launch.op, network, case_of(launch, network)))
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
        f"one pass: {total:.0f} us predicted, {batch / total * 1e6:,.0f} images/s; "
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


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--chip", choices=GPUS, default="h100", help="(default: %(default)s)")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--markdown", action="store_true", help="docs/performance.md's table")
    parser.add_argument("--uint8", action="store_true", help="images as bytes, NHWC")
    parser.add_argument("--format", choices=FORMATS, help="of a quantised model, beside bf16")
    parser.add_argument("--attention", action="store_true", help="attention in fp8 too")
    args = parser.parse_args(argv)
    if args.attention and args.format != "fp8":
        parser.error("--attention wants --format fp8")
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
