"""What one forward pass should take on an H200, kernel by kernel, and what it took where measured.

    python -m benchmarks.predict                        DeiT-Ti, S, B and B-384 at batch 256
    python -m benchmarks.predict --network S --batch 64
    python -m benchmarks.predict --format fp8           quantised, and how many times bf16 that is

The launches are those of the model itself, run on the meta device as if on the chip: what is not
listed is not launched, and what is no kernel of deit_fast is named. A launch is predicted to take
the longer of its arithmetic (at a share of the measured matrix ceiling that grows with K; of
operands in eight bits the ceiling is twice as high, and K counts half) and its
traffic (at 90% of the measured copy), and half of its epilogue's instructions, the other half being
hidden by the second program on a multiprocessor. Ceilings are those of benchmarks/results/h200
where that is there, else another H200's: 788 TFLOP/s, 4.3 TB/s. Nothing here is a measurement but
what stands under "measured".
"""

import argparse
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import deit_fast
from benchmarks.measured import Chip as Measured
from benchmarks.table5 import ENTRIES
from deit_fast.bench.launches import Recorder, record
from deit_fast.kernels import _runtime
from deit_fast.kernels.cases import DEIT
from deit_fast.kernels.quantize import FORMATS

H200 = _runtime.Chip("NVIDIA H200", (9, 0), 132)
CLOCK_GHZ = 1.75  # under load
ELSEWHERE = {"bf16_tflops": 788.0, "copy_tb_per_s": 4.3}
RESULTS = Path(__file__).with_name("results")
# of the matrix ceiling, by K: filling and draining the pipeline weighs more when K is small
EFFICIENCY = {192: 0.50, 384: 0.62, 768: 0.72, 1536: 0.75, 3072: 0.78}
ATTENTION_EFFICIENCY = 0.5
COPY_EFFICIENCY = 0.9
LEAST_US = 2.0  # of any launch
# the ahead-of-time count of GELU: instructions and of them MUFU an element; 128 and 16 lanes
GELU_CYCLES = max(13 / 128, 2 / 16)
HIDDEN = 0.5
NETWORKS = {
    "Ti": "deit_tiny_distilled", "S": "deit_small_distilled", "B": "deit_base_distilled",
    "B-384": "deit_base_distilled_384",
}  # fmt: skip
MEASURED_AS = {
    None: "deit_fast_engine_bf16", "fp8": "deit_fast_engine_fp8", "int8": "deit_fast_int8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    op: str
    shape: str
    flops: int
    bytes: int
    gelu: int = 0  # elements
    k: int | None = None  # of a matrix product
    parts: int = 1  # kernels it consists of
    rate: int = 1  # of the matrix ceiling, 2 with operands in eight bits

    def times(self, ceilings: dict) -> dict[str, float]:
        """Microseconds: "arithmetic", "traffic", "epilogue" (not hidden) and "predicted"."""
        efficiency = ATTENTION_EFFICIENCY if self.k is None else _efficiency(self.k / self.rate)
        ceiling = self.rate * ceilings["bf16_tflops"]
        found = {
            "arithmetic": self.flops / (efficiency * ceiling) / 1e6,
            "traffic": self.bytes / (COPY_EFFICIENCY * ceilings["copy_tb_per_s"]) / 1e6,
        }
        cycles = self.gelu * GELU_CYCLES * (1 - HIDDEN)
        found["epilogue"] = cycles / (H200.processors * CLOCK_GHZ * 1e3)
        total = max(found["arithmetic"], found["traffic"]) + found["epilogue"]
        return found | {"predicted": max(total, LEAST_US * self.parts)}


def _efficiency(k):
    """Linear in log K between the marks."""
    marks = sorted(EFFICIENCY.items())
    if k <= marks[0][0]:
        return marks[0][1]
    for (low, a), (high, b) in zip(marks, marks[1:], strict=False):
        if k <= high:
            return a + (b - a) * math.log(k / low) / math.log(high / low)
    return marks[-1][1]


def _product(op, x, weight, others, out, activation, parts=1, extra=0):
    (M, K), N = x.shape, weight.shape[0]
    shape = f"{M} x {K} -> {N}" + (", gelu" if activation == "gelu" else "")
    moved = _nbytes(x, weight, *others, out) + extra
    return Launch(
        op, shape, 2 * M * N * K, moved, M * N * (activation == "gelu"), K, parts
    )  # fmt: skip


def _nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _linear(out, x, weight, bias, residual, layer_scale, row_scale, activation, emit, *_):
    y, moments, _ = out
    return _product(
        "linear", x, weight, (bias, residual, layer_scale, row_scale, moments), y, activation
    )


def _layer_norm_linear(out, x, norm_weight, norm_bias, weight, bias, moments, eps, activation):
    extra = 2 * _nbytes(weight)  # read, folded, written
    extra += _nbytes(x) + 8 * x.shape[0] if moments is None else 0
    parts = 2 + (moments is None)
    return _product(
        "layer_norm_linear", x, weight, (bias, moments), out, activation, parts, extra
    )  # fmt: skip


def _layer_norm_mlp(out, x, norm_weight, norm_bias, w1, b1, w2, b2, residual, eps, emit):
    M, D = x.shape
    hidden = w1.shape[0]
    return Launch(
        "layer_norm_mlp", f"{M} x {D}, hidden {hidden}, fused", 4 * M * D * hidden,
        _nbytes(x, w1, w2, residual, *out), M * hidden, D,
    )  # fmt: skip


def _quantized_linear(
    out, x, x_scales, weight, weight_scales, bias, residual, layer_scale, row_scale, out_scale,
    activation, dtype,
):  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    gelu = activation == "gelu"
    shape = f"{M} x {K} -> {N}, {_format(x)}" + ", gelu" * gelu
    others = (x_scales, weight_scales, bias, residual, layer_scale, row_scale)
    return Launch(
        "quantized_linear", shape, 2 * M * N * K, _nbytes(x, weight, *others, *out), M * N * gelu,
        K, rate=2,
    )  # fmt: skip


def _format(x):
    return "int8" if x.dtype == torch.int8 else "fp8"


def _quantize(out, x, *_):
    shape = f"{' x '.join(map(str, x.shape))}, {_format(out[0])}"
    return Launch("quantize", shape, 0, _nbytes(x, *out))


def _layer_norm_quantized(out, x, *_):
    return replace(_quantize(out, x), op="layer_norm_quantized")


def _attention_quantized(out, q, k, v, *_):
    eight = q.element_size() == 1
    wide = _attention(out, q, k, v)
    shape = f"{wide.shape}, {_format(out[0])}" + " operands" * eight
    return replace(wide, op="attention_quantized", shape=shape, rate=1 + eight)


def _attention(out, q, k, v, *_):
    B, N, H, d = q.shape
    L = k.shape[1]
    flops, moved = 4 * B * H * N * L * d, _nbytes(q, k, v, *out)
    return Launch("attention", f"{B} x {H}, {N} of {L}", flops, moved)


def _talking_heads(out, qkv, *_):
    B, N, _, H, d = qkv.shape
    flops = 4 * B * H * N * N * (d + H)  # q k^T, a v; both mixtures
    return Launch("talking_heads", f"{B} x {H}, {N} of {N}", flops, _nbytes(qkv, *out))


def _layer_norm(out, x, residual, *_):
    return Launch("layer_norm", " x ".join(map(str, x.shape)), 0, _nbytes(x, residual, *out))


def _patch_embed(out, image, weight, *_):
    D, K = weight.shape[0], weight[0].numel()
    patches = image.numel() // K
    kind = "uint8" if image.dtype == torch.uint8 else "float"
    return Launch(
        "patch_embed", f"{patches} x {K} -> {D}, {kind}", 2 * patches * K * D,
        _nbytes(image, weight, out), 0, K,
    )  # fmt: skip


def _classifier(out, x, norm_weight, norm_bias, w0, b0, w1, *_):
    B, _, D = x.shape
    heads = 1 if w1 is None else 2
    return Launch(
        "classifier", f"{B} x {D} -> {w0.shape[0]}", 2 * heads * B * D * w0.shape[0],
        2 * heads * B * D + _nbytes(w0, w1, out), 0, D,
    )  # fmt: skip


_READ = {
    "linear": _linear, "layer_norm_linear": _layer_norm_linear, "layer_norm_mlp": _layer_norm_mlp,
    "attention": _attention, "layer_norm": _layer_norm, "patch_embed": _patch_embed,
    "classifier": _classifier, "talking_heads": _talking_heads,
    "quantized_linear": _quantized_linear, "quantize": _quantize,
    "layer_norm_quantized": _layer_norm_quantized, "attention_quantized": _attention_quantized,
}  # fmt: skip


def launches(recorder: Recorder) -> list[Launch]:
    return [_READ[name](result, *args) for name, args, result in recorder.calls]


def ceilings() -> tuple[dict, str]:
    """Of the H200, and where they are from."""
    path = RESULTS / "h200"
    if (path / "ceilings.json").exists():
        measured = Measured.read(path)
        return measured.ceilings, f"measured here, {measured.newest.date}"
    return ELSEWHERE, "measured on another H200"


def measured_rows(batch: int, mode: str) -> tuple[dict, dict]:
    """{(op, network, case): microseconds} of the kernels and {network: images/s} of the models in
    that mode of the benchmarks."""
    path = RESULTS / "h200"
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
        row = chip.row(entry, mode, "batch", batch)
        if row and row.images_per_s:
            models[entry.network.removeprefix("DeiT-").removesuffix(" distilled")] = (
                row.images_per_s
            )
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
    format: str | None = None, attention: bool = False,
):  # fmt: skip
    """(rows of (launch, count, times), total microseconds, operations of PyTorch's own). format,
    attention: of `deit_fast.quantize`."""
    with torch.device("meta"), _runtime.pretend(H200):
        model = getattr(deit_fast, NETWORKS[network])()
        if format is not None:
            deit_fast.quantize(model, format, attention=attention)
    recorder = record(model, batch, torch.bfloat16, H200, uint8, tables)
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
    """The table of docs/performance.md: batch 256, another H200's ceilings, no tuned table."""
    lines = [
        "| | Ti | S | B | B-384 |",
        "|---|---:|---:|---:|---:|",
    ]
    found = {n: predict(n, 256, ELSEWHERE, tables=False) for n in NETWORKS}

    def line(name, value, form):
        lines.append(f"| {name} | " + " | ".join(form.format(value(n)) for n in NETWORKS) + " |")

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

    def of_ceiling(network):
        flops = 256 * full_flops(network)
        return flops / ELSEWHERE["bf16_tflops"] / 1e4 / found[network][1]

    line("of the matrix ceiling, full-model FLOPs", of_ceiling, "{:.0f}%")
    return "\n".join(lines)


def show(
    network: str, batch: int, console: Console, uint8: bool, format: str | None = None,
    attention: bool = False,
) -> None:  # fmt: skip
    limits, source = ceilings()
    mode = "deit_fast_fp8_attention" if attention else MEASURED_AS[format]
    kernels, models = measured_rows(batch, mode)
    rows, total, others = predict(network, batch, limits, uint8, True, format, attention)
    kind = (format or "bf16") + ", attention too" * attention
    title = (
        f"DeiT-{network} distilled, {kind}, batch {batch}, H200: {limits['bf16_tflops']:.0f} "
        f"TFLOP/s, {limits['copy_tb_per_s']:.1f} TB/s ({source})"
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
        f"{flops / 1e9:.0f} GFLOP, at bf16's ceiling {flops / limits['bf16_tflops'] / 1e6:.0f} us"
    )
    if format is not None:
        plain = predict(network, batch, limits, uint8)[1]
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
        parser.error(f"--batch: {args.batch}, want 1 or more")
    if args.markdown:
        print(markdown())
        return
    console = Console(width=160)
    for network in args.network:
        show(network, args.batch, console, args.uint8, args.format, args.attention)


if __name__ == "__main__":
    main()
