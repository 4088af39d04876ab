"""Throughput against ImageNet top-1: Figure 1 of the paper."""

from benchmarks.measured import Chip
from benchmarks.predict.chips import H100
from benchmarks.predict.model import images_per_s
from benchmarks.table5 import ENTRIES, distinct
from deit_fast.bench.modes import MODES

from . import style
from .labels import Label, place
from .style import Picture

# line -> beginning and end of the networks' names, colour, the name of a point
LINES = {
    "EfficientNet": ("EfficientNet-", "", style.ORANGE),
    "RegNetY": ("RegNetY-", "", style.PURPLE),
    "ResNet": ("ResNet-", "", style.BLACK),
    "ViT": ("ViT-", "", style.TEAL),
    "DeiT": ("DeiT-", "", style.BLUE),
    "DeiT distilled": ("DeiT-", " distilled", style.VERMILLION),
    "DeiT distilled, 1000 epochs": ("DeiT-", " distilled 1000 epochs", style.GREEN),
}
MODE = "deit_fast_engine_bf16"  # of the predictions
BATCH = 256
LIMITS = (69, 86.5)  # percent, of the axis
HEIGHT = 5.1  # inches of a panel with its axis and title
PALE = ("EfficientNet", "RegNetY", "ResNet", "ViT")  # what DeiT is compared with


def line_of(network: str) -> tuple[str, str] | None:
    """The line of a network, the most particular, and its name on it; None: on no line."""
    fits = [n for n, (a, z, _) in LINES.items() if network.startswith(a) and network.endswith(z)]
    if not fits or network.endswith(" RA"):  # RandAugment: other points of EfficientNet's
        return None
    name = max(fits, key=lambda n: len(LINES[n][1]))
    begin, end, _ = LINES[name]
    return name, network.removeprefix(begin).removesuffix(end)


def fastest(chip: Chip, entry):
    """The fastest measured row of deit_fast without quantization, or None."""
    rows = (
        chip.throughput(entry, name)
        for name, mode in MODES.items()
        if mode.fast and not mode.train and not mode.quantized_format
    )
    return max(filter(None, rows), key=lambda r: r.images_per_s, default=None)


def predicted() -> list[tuple[str, float, float]]:
    """(network, images/s on an H100, top-1) of the distilled DeiTs."""
    found = []
    for entry in distinct([e for e in ENTRIES if e.network.endswith(" distilled")]):
        short = entry.network.removeprefix("DeiT-").removesuffix(" distilled")
        speed = images_per_s(short, MODE, BATCH, H100.peak_rates)
        if speed is not None:
            found.append((short, speed, entry.imagenet_top1))
    return found


def draw(chips: list[Chip]) -> Picture:
    """The paper's V100, with the predicted H100 where no GPU was measured; a panel a chip.

    Args:
        chips: With rows of networks; each has a panel.
    """
    gpu = any(not chip.is_cpu for chip in chips)
    said = "Accuracies are the paper's. Throughput: the paper measured a V100 in fp32"
    if not gpu:
        said += ";\nhollow diamonds: deit_fast in bf16 on an H100, predicted, not measured"
    height = 0.8 + HEIGHT * (1 + len(chips))
    figure = style.frame(height, "Throughput and accuracy on ImageNet", said + ".")
    return _draw(figure, chips, gpu)


def _draw(figure, chips, gpu):
    words = []
    for i, axes in enumerate(style.rows(figure, 1 + len(chips), HEIGHT)):
        axes.set(xscale="log", ylim=LIMITS, ylabel="ImageNet top-1, %")
        axes.set_xlabel("images/s (logarithmic)")
        if i == 0:
            words.append(_paper(axes, [] if gpu else predicted()))
        else:
            words.append(_chip(axes, chips[i - 1]))
        style.logarithmic(axes.xaxis)
    return Picture(figure, "Throughput against ImageNet top-1", " ".join(words))


def _weight(name):
    return {"linewidth": 1, "markersize": 4} if name in PALE else {"linewidth": 2}


def _groups(measure):
    groups = {name: [] for name in LINES}
    for entry in ENTRIES:
        found, speed = line_of(entry.network), measure(entry)
        if found and speed:
            groups[found[0]].append((speed, entry.imagenet_top1, found[1]))
    return {name: sorted(points) for name, points in groups.items() if points}


def _paper(axes, ahead):
    groups = _groups(lambda e: e.v100_images_per_s)
    axes.set_xlim(20, 300_000 if ahead else 8000)
    labels = []
    for name, found in groups.items():
        colour = LINES[name][2]
        axes.plot(*zip(*[p[:2] for p in found], strict=True), "o-", color=colour, **_weight(name))
        labels += _labels(name, found, colour)
    if ahead:
        axes.plot(
            [x for _, x, _ in ahead], [y for *_, y in ahead], "D--", color=style.VERMILLION,
            markerfacecolor="none", linewidth=1.2,
        )  # fmt: skip
        labels += [Label(f"{n} (predicted)", x, y, style.VERMILLION) for n, x, y in ahead]
        line = "DeiT distilled by deit_fast: predicted"
        labels.append(Label(line, *ahead[1][1:], style.VERMILLION, True))
    style.heading(axes, "Paper, V100, fp32" + ", and predicted, H100, bf16" * bool(ahead))
    place(axes, sorted(labels, key=lambda label: not label.bold))
    words = [f"Paper, V100: {_words(groups)}."]
    if ahead:
        each = ", ".join(f"{n} {x:,.0f}" for n, x, _ in ahead)
        words.append(f"deit_fast on an H100, predicted images/s, distilled DeiT: {each}.")
    return " ".join(words)


def _labels(name, found, colour):
    """The line's name beside its slowest point, then those of the points."""
    yield Label(name, *found[0][:2], colour, True)
    for x, y, short in found:
        yield Label(short, x, y, colour, needed=name not in PALE)


def _words(groups):
    return "; ".join(
        f"{name}: " + ", ".join(f"{short} {x:,.4g} images/s {y}%" for x, y, short in found)
        for name, found in groups.items()
    )


def _speed(row):
    return row and row.images_per_s


def _chip(axes, chip):
    eager = _groups(lambda e: _speed(chip.throughput(e, "eager_fp32")))
    ours = _groups(lambda e: _speed(fastest(chip, e)))
    speeds = [x for found in (*eager.values(), *ours.values()) for x, *_ in found] or [1.0]
    axes.set_xlim(min(speeds) / 2, max(speeds) * 2.5)
    labels = []
    for groups, mark in ((eager, "o-"), (ours, "*")):
        for name, found in groups.items():
            colour = LINES[name][2]
            axes.plot(
                *zip(*[p[:2] for p in found], strict=True), mark, color=colour,
                **_weight(name) | ({"markersize": 11} if mark == "*" else {}),
            )  # fmt: skip
            labels += _labels(name, found, colour) if mark != "*" else ()
    style.heading(
        axes, chip.name, "measured; circles: eager PyTorch fp32, stars: deit_fast's fastest mode"
    )
    place(axes, sorted(labels, key=lambda label: not label.bold))
    return (
        f"{chip.name}, measured (protocol: {chip.protocol}): eager PyTorch fp32: {_words(eager)}. "
        f"deit_fast: {_words(ours)}."
    )


def has_rows(chip: Chip) -> bool:
    """Whether a panel of that chip would show a point."""
    return any(chip.throughput(entry, "eager_fp32") or fastest(chip, entry) for entry in ENTRIES)
