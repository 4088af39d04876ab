"""Operations of the forward pass under the roofline of an H100."""

from collections import defaultdict
from math import atan, degrees, log10

from benchmarks.measured import Chip
from benchmarks.predict.chips import H100
from benchmarks.predict.model import case_of, predict

from . import style
from .labels import Label, place
from .style import Picture

BATCH = 256
NETWORKS = {"Ti": style.GREEN, "S": style.BLUE, "B": style.VERMILLION}
NAMES = {  # (operation, case of its benchmark) -> its name in the picture
    ("layer_norm_linear", "qkv"): "qkv", ("attention", ""): "attention", ("linear", "proj"): "proj",
    ("layer_norm_linear", "fc1"): "fc1", ("linear", "fc2"): "fc2",
    ("patch_embed", "float NCHW"): "patch embed",
}  # fmt: skip


def predicted(network: str) -> dict[str, tuple[float, float, float]]:
    """{operation: (FLOPs a byte, TFLOP/s, share of the forward pass)} as predicted."""
    rows, total, _ = predict(network, BATCH, H100.peak_rates, tables=False)
    found, shares = {}, defaultdict(float)
    for launch, count, times in rows:
        name = NAMES.get((launch.op, case_of(launch, network)))
        if name is None:
            continue
        shares[name] += count * times["predicted"] / total
        if count >= found.get(name, (0,))[0]:  # that of most blocks
            reached = launch.flops / times["predicted"] / 1e6
            found[name] = (count, launch.flops / launch.bytes, reached)
    return {name: (*found[name][1:], shares[name]) for name in found}


def measured(chip: Chip, network: str) -> dict[str, tuple[float, float]]:
    """{operation: (FLOPs a byte, TFLOP/s)} of the fused kernels."""
    return {
        NAMES[r.op, r.case]: (r.flops / r.bytes, r.tflops)
        for r in chip.kernels
        if (r.op, r.case) in NAMES and r.network == network and r.batch == BATCH
        and (r.mode, r.dtype, r.status) == ("fused", "bf16", "measured")
    }  # fmt: skip


def has_rows(chip: Chip) -> bool:
    """Whether a kernel of the forward pass was measured there, on a GPU."""
    return not chip.is_cpu and any(measured(chip, network) for network in NETWORKS)


def draw(chips: list[Chip]) -> Picture:
    """Each operation of a block; measured on the first of these chips, else predicted."""
    chip = next(filter(has_rows, chips), None)
    name = chip.name if chip else "NVIDIA H100"
    rates = chip.peak_rates if chip else H100.peak_rates
    kind = "measured" if chip else "predicted"
    said = (
        f"Each point is one kernel of a DeiT at batch {BATCH}, bf16, {kind}. Above it: the most "
        "that its\nmemory traffic (slope) or the matrix units (level) allow"
    )
    said += "." if chip else "; both rates were measured on an H100."
    figure = style.frame(5.2, f"Roofline of the forward pass, {name}", said)
    axes = style.panels(figure, 1)[0]
    bandwidth, peak = rates["copy_tb_per_s"], rates["bf16_tflops"]
    axes.set(xscale="log", yscale="log", xlim=(50, 1500), ylim=(60, 1300))
    ridge = peak / bandwidth
    axes.plot([50, ridge, 1500], [50 * bandwidth, peak, peak], color=style.MUTED, linewidth=2)
    labels, words = [], []
    for network, colour in NETWORKS.items():
        found = measured(chip, network) if chip else predicted(network)
        for operation, (x, y, *_) in found.items():
            axes.plot(
                x, y, "o" if chip else "D", color=colour, markersize=7,
                markerfacecolor=colour if chip else "none", markeredgewidth=1.6,
            )  # fmt: skip
            labels.append(Label(operation, x, y, colour))
        words.append(f"DeiT-{network}, {kind}: {_words(found)}.")
    _roof_labels(axes, bandwidth, peak)
    _key(axes, kind)
    place(axes, labels)
    axes.set(xlabel="FLOP per byte of memory traffic (logarithmic)", ylabel="TFLOP/s, logarithmic")
    steps = (100, 200, 500, 1000)
    for axis, ticks in ((axes.xaxis, (50, *steps)), (axes.yaxis, steps)):
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_ticks([], minor=True)
    words = [f"Roof: {bandwidth:g} TB/s, {peak:g} TFLOP/s.", *words]
    return Picture(figure, f"Roofline of the forward pass, {name}, {kind}", " ".join(words))


def _roof_labels(axes, bandwidth, peak):
    level = {"color": style.MUTED, "fontsize": 8.5, "va": "bottom"}
    axes.text(1480, peak * 1.03, f"{peak:g} TFLOP/s (bf16)", ha="right", **level)
    width, height = axes.get_window_extent().size
    slope = (height / _decades(*axes.get_ylim())) / (width / _decades(*axes.get_xlim()))
    axes.text(
        54, 54 * bandwidth * 1.05, f"{bandwidth:g} TB/s (copy)", rotation=degrees(atan(slope)),
        rotation_mode="anchor", ha="left", **level,
    )  # fmt: skip


def _decades(low, high):
    return log10(high / low)


def _key(axes, kind):
    for i, (network, colour) in enumerate(NETWORKS.items()):
        axes.text(
            0.98, 0.05 + 0.06 * i, f"DeiT-{network}, {kind}", transform=axes.transAxes, ha="right",
            color=colour, fontweight="bold", fontsize=9.5,
        )  # fmt: skip


def _words(found):
    return ", ".join(
        f"{operation} {x:.0f} FLOP per byte {y:.0f} TFLOP/s"
        + (f" {rest[0]:.0%} of the time" if rest else "")
        for operation, (x, y, *rest) in found.items()
    )
