"""The training studies, from the data of docs/studies alone."""

import statistics

import numpy as np

from . import style
from .labels import Label, place
from .style import Picture


def training(study: dict) -> Picture:
    """Loss and top-1 after each epoch, of curves.json."""
    plan = study["plan"]
    below = (
        f"{plan['count']:,} images of Fashion-MNIST, {study['tested']:,} to test on, one seed, "
        "measured on a CPU in fp32.\nWith distillation half of the loss is cross-entropy with "
        "the teacher's decision: compare courses, not levels."
    )
    figure = style.frame(4.5, "Training loss and accuracy by epoch", below)
    left, right = style.panels(figure, 2, top=1.2)
    words = []
    colours = (style.BLACK, style.BLUE, style.VERMILLION)
    for run, colour in zip(study["runs"], colours, strict=True):
        epochs = range(1, len(run["loss"]) + 1)
        left.plot(epochs, run["loss"], "o-", color=colour, markersize=4)
        right.plot(epochs, run["top1"], "o-", color=colour, markersize=4)
        ends = f"loss {run['loss'][0]:.3f} to {run['loss'][-1]:.3f}"
        course = ", ".join(f"{value:.2f}" for value in run["top1"])
        words.append(f"{run['label']}: {ends}; top-1 after each epoch, %: {course}.")
    for axes, key in ((left, "loss"), (right, "top1")):
        axes.set(xlabel="epoch", xlim=(0.6, len(epochs) + 0.4))
        axes.set_xticks(epochs, [str(i) for i in epochs])
        axes.margins(y=0.12)
        top = 0.97 if key == "loss" else 0.25
        for i, (run, colour) in enumerate(zip(study["runs"], colours, strict=True)):
            axes.text(
                0.98, top - 0.075 * i, run["label"], color=colour, fontsize=8.5, ha="right",
                va="top", fontweight="bold", transform=axes.transAxes,
            )  # fmt: skip
    style.heading(left, "Training loss")
    style.heading(right, "Top-1 on the test images, %")
    return Picture(figure, "Training loss and accuracy by epoch", " ".join(words))


def top1(study: dict) -> Picture:
    """Each run of fashion_mnist.json, and the means."""
    rows, seeds = study["rows"], len(study["seeds"])
    below = (
        f"Fashion-MNIST, {study['images']:,} images to train on, {study['tested']:,} to test on; "
        "measured on a CPU.\n"
        f"Circles: each of {seeds} seeds. Line: their mean."
    )
    figure = style.frame(4.6, "Distillation through attention, reduced", below)
    axes = style.panels(figure, 1, left=3.35, right=0.3, top=1.1)[0]
    teacher, words = study["teacher"]["top1"], []
    for y, row in enumerate(reversed(rows)):
        mean = statistics.mean(row["top1"])
        axes.plot(
            row["top1"], [y] * seeds, "o", color=style.BLUE, markerfacecolor="none",
            markeredgewidth=1.4,
        )  # fmt: skip
        axes.plot([mean, mean], [y - 0.16, y + 0.16], color=style.VERMILLION, linewidth=2.4)
        axes.text(mean, y + 0.25, f"{mean:.2f}", ha="center", color=style.VERMILLION, fontsize=8)
    for row in rows:
        each = ", ".join(f"{value:.2f}" for value in row["top1"])
        words.append(f"{row['row']}: {each}%, mean {statistics.mean(row['top1']):.2f}%.")
    axes.axvline(teacher, color=style.BLACK, linestyle="--", linewidth=1.2)
    axes.text(teacher - 0.06, -0.62, f"teacher {teacher:.2f}", ha="right", color=style.BLACK)
    axes.set_yticks(range(len(rows)), [row["row"] for row in reversed(rows)])
    axes.tick_params(axis="y", length=0, labelcolor=style.INK)
    axes.set(ylim=(-0.8, len(rows) - 0.35), xlabel="top-1 on the test images, %")
    axes.grid(axis="y", visible=False)
    words.append(f"Teacher: {teacher:.2f}%.")
    return Picture(figure, "Top-1 of each method and seed", " ".join(words))


def tokens(study: dict) -> Picture:
    """Cosine of class and distillation token through the model, of fashion_mnist.json."""
    places, values = zip(*study["cosines"].items(), strict=True)
    below = "Mean cosine over the test images of Fashion-MNIST; measured on a CPU, one seed."
    figure = style.frame(3.6, "Class and distillation token grow alike", below)
    axes = style.panels(figure, 1, left=0.85)[0]
    axes.plot(values, "o-", color=style.BLUE)
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    axes.set(ylim=(-0.35, 1.05), ylabel="cosine", xlim=(-0.4, len(values) - 0.6))
    axes.set_xticks(range(len(places)), [_after(name) for name in places])
    place(axes, [Label(f"{v:.2f}", i, v, style.BLUE, True) for i, v in enumerate(values)])
    words = ", ".join(f"{_after(name)} {v:.3f}" for name, v in study["cosines"].items())
    return Picture(figure, "Cosine of class and distillation token", words)


def _after(name):
    return name if name == "input" else f"after {name}"


def disagreement(study: dict) -> Picture:
    """The disagreement rates of fashion_mnist.json as a table of shades."""
    names = study["disagreement"]["classifiers"]
    rates = np.array(study["disagreement"]["rates"])
    below = (
        f"Share of {study['tested']:,} test images of Fashion-MNIST for which two predict "
        "different classes, %; measured on a CPU.\nclass, distil., both: heads of the distilled "
        "DeiT. DeiT: without distillation. convnet: the teacher."
    )
    figure = style.frame(4.0, "Who disagrees with whom", below)
    axes = style.panels(figure, 1, left=0.9, right=0.3, bottom=0.42, top=0.95)[0]
    for (i, j), rate in np.ndenumerate(rates):
        axes.fill_between(
            [j, j + 0.97], i, i + 0.95, color=style.BLUE, alpha=round(0.5 * rate / rates.max(), 2),
            linewidth=0,
        )  # fmt: skip
        shown = "–" if i == j else f"{100 * rate:.1f}"
        axes.text(j + 0.485, i + 0.475, shown, ha="center", va="center")
    middles = np.arange(len(names)) + 0.485
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0, labelcolor=style.INK)
    axes.set(xlim=(0, len(names)), ylim=(len(names), 0))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    words = ". ".join(
        f"{name}: " + ", ".join(f"{o} {100 * r:.1f}%" for o, r in zip(names, row, strict=True))
        for name, row in zip(names, rates, strict=True)
    )
    return Picture(figure, "Disagreement rates of classifiers", words)


def store(study: dict) -> Picture:
    """Top-1 of store.json's students, by what they learn from."""
    plan, words = study["plan"], []
    below = (
        f"{plan['count']:,} images of Fashion-MNIST, {plan['epochs']} epochs, "
        f"{study['tested']:,} images to test on; measured on a CPU.\n"
        f"Circles: each of {len(plan['seeds'])} seeds. Line: their mean. K: stored probabilities "
        "an image."
    )
    figure = style.frame(4.4, "Accuracy from a soft-label store", below)
    axes = style.panels(figure, 1, left=1.9, right=0.3, top=1.05)[0]
    names = {"labels": "labels, no teacher", "live": "live teacher"}
    rows = [(names.get(r["run"]) or f"store, K = {r['run'][1:]}", r) for r in study["rows"]]
    for y, (_, row) in enumerate(reversed(rows)):
        mean = statistics.mean(row["top1"])
        axes.plot(
            row["top1"], [y] * len(row["top1"]), "o", color=style.BLUE, markerfacecolor="none",
            markeredgewidth=1.4,
        )  # fmt: skip
        axes.plot([mean, mean], [y - 0.16, y + 0.16], color=style.VERMILLION, linewidth=2.4)
        axes.text(mean, y + 0.25, f"{mean:.2f}", ha="center", color=style.VERMILLION, fontsize=8)
    for name, row in rows:
        each = ", ".join(f"{value:.2f}" for value in row["top1"])
        words.append(f"{name}: {each}%, mean {statistics.mean(row['top1']):.2f}%.")
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.tick_params(axis="y", length=0, labelcolor=style.INK)
    axes.set(ylim=(-0.6, len(rows) - 0.3), xlabel="top-1 on the test images, %")
    axes.grid(axis="y", visible=False)
    return Picture(figure, "Top-1 from a soft-label store", " ".join(words))
