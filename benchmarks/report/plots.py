"""The plots of the report: Figure 1 of the paper, ratios to eager PyTorch, rooflines."""

import io

from matplotlib import cycler, rc_context
from matplotlib.figure import Figure

from benchmarks.measured import Chip, ratio
from benchmarks.table5 import ENTRIES, distinct
from deit_fast.bench.modes import MODES

LINES = {  # one line of Figure 1 each: name -> beginning and end of the networks' names
    "ResNet": ("ResNet", ""),
    "RegNetY": ("RegNetY", ""),
    "EfficientNet": ("EfficientNet", ""),
    "ViT": ("ViT", ""),
    "DeiT": ("DeiT", ""),
    "DeiT distilled": ("DeiT", "distilled"),
    "DeiT distilled, 1000 epochs": ("DeiT", "1000 epochs"),
}
# Okabe and Ito's, told apart by the colour-blind too
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b", "#8c6d00"
STYLE = {
    "axes.prop_cycle": cycler(color=COLOURS), "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "svg.hashsalt": "deit_fast", "figure.constrained_layout.use": True,
}  # fmt: skip


def _line(network):
    """The line a network belongs to: the most particular."""
    fits = [n for n, (a, z) in LINES.items() if network.startswith(a) and network.endswith(z)]
    return max(fits, key=lambda n: len(LINES[n][1]), default=network)


def _fastest(chip, entry):
    rows = [
        chip.throughput(entry, name)
        for name, m in MODES.items()
        if m.fast and not m.train and not m.quantized_format  # the axis is the accuracy without
    ]
    return max(filter(None, rows), key=lambda r: r.images_per_s, default=None)


def figure1(chip: Chip) -> Figure:
    """Throughput against ImageNet top-1, Figure 1 of the paper.

    The paper's V100 hollow, eager fp32 here filled, the fastest mode of deit_fast a star.
    """
    figure = Figure(figsize=(9, 5.5))
    axes = figure.subplots()
    groups = {}
    for entry in ENTRIES:
        groups.setdefault(_line(entry.network), []).append(entry)
    for i, (name, entries) in enumerate(groups.items()):
        colour = f"C{i}"
        v100 = [(e.v100_images_per_s, e.imagenet_top1) for e in entries]
        _draw(axes, v100, colour, "o", "none", ":", None)
        for label, marker, measure in (
            (name, "o", lambda e: chip.throughput(e, "eager_fp32")),
            (None, "*", lambda e: _fastest(chip, e)),
        ):
            points = [(r.images_per_s, e.imagenet_top1) for e in entries if (r := measure(e))]
            _draw(axes, points, colour, marker, colour, "-", label)
        axes.plot([], [], color=colour, marker="o", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("images/s")
    axes.set_ylabel("ImageNet top-1, % (of the paper)")
    axes.set_title(f"hollow: V100 in the paper · filled: eager fp32 on {chip.name}, "
                   f"protocol: {chip.protocol} · star: deit_fast", fontsize=9)  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)
    return figure


def _draw(axes, points, colour, marker, fill, line, label):
    if points:
        x, y = zip(*sorted(points), strict=True)
        size = 11 if marker == "*" else 5
        axes.plot(x, y, color=colour, marker=marker, markerfacecolor=fill, linestyle=line,
                  markersize=size, linewidth=1, label=label)  # fmt: skip


def ratios(chip: Chip) -> Figure | None:
    """Each mode over eager PyTorch in the same precision, batch and build; None without any."""
    bars = []
    for entry in distinct(list(ENTRIES)):
        for name in (*chip.modes("batch"), *chip.modes("batch", train=True)):
            times = ratio(*(chip.row(entry, m, "batch") for m in (name, MODES[name].eager.name)))
            if times is not None and MODES[name].eager.name != name:
                bars.append((entry.network, name, times))
    if not bars:
        return None
    modes = list(dict.fromkeys(name for _, name, _ in bars))
    networks = list(dict.fromkeys(network for network, _, _ in bars))
    figure = Figure(figsize=(9, 1 + 0.15 * len(bars) + 0.15 * len(networks)))
    axes = figure.subplots()
    position, ticks = 0.0, []
    for network in networks:
        own = [(name, times) for n, name, times in bars if n == network]
        ticks.append(position + (len(own) - 1) / 2)
        for name, times in own:
            axes.barh(position, times, color=f"C{modes.index(name)}", height=0.85)
            axes.text(times, position, f" {times:.2f}", va="center", fontsize=7)
            position += 1
        position += 1
    for i, name in enumerate(modes):
        axes.barh([0], [0], color=f"C{i}", label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(ticks, networks)
    axes.set_ylim(position - 0.5, -1.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("times eager PyTorch of the same precision (fp8, int8: bf16)")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def rooflines(chip: Chip) -> Figure | None:
    """Kernels with matmuls under the roof, those without against the copy bandwidth."""
    rows = [r for r in chip.kernels if r.status == "measured"]
    if not rows:
        return None
    dtype = rows[0].dtype
    bandwidth, peak = chip.peak_rates["copy_tb_per_s"], chip.peak_rates[f"{dtype}_tflops"]
    figure = Figure(figsize=(11, 5))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    matmuls = [r for r in rows if r.flops]
    ops = list(dict.fromkeys(r.op for r in matmuls))
    for r in matmuls:
        fused = r.mode == "fused"
        colour = f"C{ops.index(r.op)}"
        left.plot(r.flops / r.bytes, r.tflops, "o", color=colour, alpha=0.8,
                  markerfacecolor=colour if fused else "none",
                  markersize=6 if fused else 4)  # fmt: skip
        if fused:
            label = f" {r.network} {r.case}".rstrip()
            left.annotate(label, (r.flops / r.bytes, r.tflops), fontsize=6)
    if matmuls:
        intensity = [r.flops / r.bytes for r in matmuls]
        xs = [min(intensity) / 2, peak / bandwidth, max(*intensity, peak / bandwidth) * 2]
        left.plot(xs, [min(peak, bandwidth * x) for x in xs], color="black", linewidth=1)
        for i, op in enumerate(ops):
            left.plot([], [], "o", color=f"C{i}", label=op)
        left.legend(fontsize=8)
    left.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel=f"TFLOP/s, {dtype}")
    left.set_title("filled: fused · hollow: PyTorch, compiled, others", fontsize=9)
    moving = [r for r in rows if not r.flops]
    names = [f"{r.op} {r.network} {r.mode}" for r in moving]
    right.barh(names, [r.tb_per_s for r in moving],
               color=["C0" if r.mode == "fused" else "C7" for r in moving])  # fmt: skip
    right.axvline(bandwidth, color="black", linewidth=1)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.set(xlabel="TB/s of what must move; line: a copy")
    return figure


PLOTS = {"figure1": figure1, "ratios": ratios, "rooflines": rooflines}


def draw(chip: Chip) -> dict[str, tuple[bytes, bytes]]:
    """The plots that have something to show: name -> (SVG, PNG)."""
    drawn = {}
    with rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(chip)
            if figure is None:
                continue
            images = []
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
                images.append(buffer.getvalue())
            drawn[name] = tuple(images)
    return drawn
