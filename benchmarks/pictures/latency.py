"""Latency of a forward pass against its batch size."""

from benchmarks.measured import Chip
from benchmarks.predict.chips import H100
from benchmarks.predict.model import predict
from benchmarks.table5 import ENTRIES, distinct

from . import style
from .labels import Label, place
from .style import Picture

BATCHES = tuple(2**i for i in range(9))
NETWORKS = {"Ti": style.GREEN, "S": style.BLUE, "B": style.VERMILLION}  # distilled
HEIGHT = 3.7  # inches of a panel with its axis and heading
# mode -> its line, its name; on a CPU and on a GPU
ON_CPU = {"eager_fp32": (":", "eager PyTorch fp32"), "deit_fast_fp32": ("-", "deit_fast fp32")}
ON_GPU = {
    "eager_bf16": (":", "eager PyTorch bf16"), "deit_fast_engine_bf16": ("-", "deit_fast bf16"),
}  # fmt: skip
OF = {
    entry.network.removeprefix("DeiT-").removesuffix(" distilled"): entry
    for entry in distinct(list(ENTRIES))
    if entry.network.endswith(" distilled")
}


def predicted() -> dict[str, list[tuple[int, float]]]:
    """Predicted (batch, ms) of each network on an H100, bf16."""
    limits = H100.peak_rates
    return {
        network: [(b, predict(network, b, limits, tables=False)[1] / 1e3) for b in BATCHES]
        for network in NETWORKS
    }


def measured(chip: Chip, mode: str) -> dict[str, list[tuple[int, float]]]:
    """Measured (batch, ms) of each network, by the protocol of the chip."""
    protocol, found = _protocol(chip), {}
    batches = sorted({r.batch for r in chip.models if r.protocol == protocol})
    for network in NETWORKS:
        rows = [chip.row(OF[network], mode, protocol, batch) for batch in batches]
        points = [(r.batch, r.ms_median) for r in rows if r and r.status == "measured"]
        if points:
            found[network] = points
    return found


def _protocol(chip):
    """One for a comparison: each call waited for, else of a given batch."""
    waited = any(r.protocol == "latency" and r.status == "measured" for r in chip.models)
    return "latency" if waited else "batch"


def draw(chips: list[Chip]) -> Picture:
    """The predicted H100, where no GPU was measured, and a panel for each chip with lines."""
    chips = [chip for chip in chips if _has_lines(chip)]
    gpu = any(not chip.is_cpu for chip in chips)
    count = len(chips) + (not gpu)
    said = "Time of one forward pass of DeiT with distillation token, by images in the batch."
    if not gpu:
        said += "\nH100: predicted from peak rates, GPU time of the kernels; not measured."
    figure = style.frame(0.8 + HEIGHT * count, "Latency against batch size", said)
    axes, words = style.rows(figure, count, HEIGHT), []
    if not gpu:
        words.append(_predicted(axes[0]))
    for chip, place_of in zip(chips, axes[not gpu :], strict=False):
        words.append(_chip(place_of, chip))
    for one in axes:
        one.set(xlabel="images in the batch", ylabel="ms, logarithmic")
    return Picture(figure, "Latency against batch size", " ".join(words))


def _has_lines(chip):
    """Whether some network was measured at two batch sizes."""
    return any(len(p) > 1 for mode in _modes(chip) for p in measured(chip, mode).values())


def _scale(axes, points):
    xs, ys = zip(*points, strict=True)
    axes.set(xscale="log", yscale="log", ylim=(min(ys) / 1.8, max(ys) * 1.8))
    axes.set_xlim(min(xs) / 1.3, max(xs) * 6)
    axes.set_xticks(sorted(set(xs)), [str(x) for x in sorted(set(xs))])
    axes.set_xticks([], minor=True)
    style.logarithmic(axes.yaxis)


def _predicted(axes):
    found = predicted()
    for network, points in found.items():
        axes.plot(
            *zip(*points, strict=True), "D--", color=NETWORKS[network], markerfacecolor="none",
            markersize=5, linewidth=1.3,
        )  # fmt: skip
    _scale(axes, [point for points in found.values() for point in points])
    ends = [(network, points[-1]) for network, points in found.items()]
    place(axes, [Label(f"DeiT-{n}, predicted", *end, NETWORKS[n], True) for n, end in ends])
    style.heading(axes, "deit_fast, H100, bf16: predicted")
    return f"deit_fast on an H100, bf16, predicted: {_words(found)}."


def _chip(axes, chip):
    drawn, words, labels, names, named = [], [], [], [], set()
    for mode, (line, name) in _modes(chip).items():
        found = measured(chip, mode)
        if not found:
            continue
        names.append(f"{'dotted' if line == ':' else 'solid'}: {name}")
        words.append(f"{name}: {_words(found)}")
        for network, points in found.items():
            axes.plot(*zip(*points, strict=True), "o" + line, color=NETWORKS[network])
            drawn += points
            if network not in named:
                named.add(network)
                labels.append(Label(f"DeiT-{network}", *points[-1], NETWORKS[network], True))
    _scale(axes, drawn)
    place(axes, labels)
    style.heading(axes, chip.name, f"measured; {', '.join(names)}")
    return f"{chip.name}, measured: {'; '.join(words)}."


def has_rows(chip: Chip) -> bool:
    """Whether a panel of that chip would show a line."""
    return any(measured(chip, mode) for mode in _modes(chip))


def _modes(chip):
    return ON_CPU if chip.is_cpu else ON_GPU


def _words(found):
    return "; ".join(
        f"DeiT-{network}: " + ", ".join(f"batch {batch} {ms:.3g} ms" for batch, ms in points)
        for network, points in found.items()
    )
