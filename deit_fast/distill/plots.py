"""Plots of the analyses. Importing this needs matplotlib."""

import textwrap
from pathlib import Path

import numpy as np

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ImportError as error:
    raise RuntimeError(
        "plots: matplotlib is missing, expected pip install 'deit_fast[train]'"
    ) from error

STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "figure.constrained_layout.use": True,
}  # fmt: skip


def matrix(names: list[str], values: np.ndarray, title: str, path: str | Path) -> None:
    """Draw a heat map with the number in each cell, as a PNG.

    Args:
        names: Of rows and columns.
        values: (n, n).
        title: Above it.
        path: Of the PNG.
    """
    with rc_context(STYLE | {"axes.grid": False}):
        side = 2.5 + 0.6 * len(names)
        figure = Figure(figsize=(side, side))
        axes = figure.subplots()
        axes.imshow(values, cmap="Blues", vmin=0)
        middle = values.max() / 2
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if value > middle else "black"
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
        figure.savefig(path, format="png", dpi=150)


def line(points: dict[str, float], title: str, what: str, path: str | Path) -> None:
    """Draw values in their order, each with its name below, as a PNG.

    Args:
        points: {name: value}.
        title: Above it.
        what: The values are, at their axis.
        path: Of the PNG.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4))
        axes = figure.subplots()
        axes.plot(list(points), list(points.values()), marker="o")
        axes.tick_params(axis="x", rotation=45)
        axes.set_ylabel(what)
        axes.set_title(title)
        figure.savefig(path, format="png", dpi=150)


def attention(
    rows: list[tuple[str, np.ndarray, dict[str, np.ndarray]]], title: str, path: str | Path
) -> None:
    """Draw attention maps over images, a row for each image, as a PNG.

    Args:
        rows: The name of an image, its pixels uint8 (H, W, C), and {token: its map (h, w)}, which
            is drawn over the image in gray, from its own least to its own largest value.
        title: Above them.
        path: Of the PNG.
    """
    _, pixels, maps = rows[0]
    headings = ["image", *(f"{token} token" for token in maps)]
    height, width, _ = pixels.shape
    over = (-0.5, width - 0.5, height - 0.5, -0.5)
    gray = {"cmap": "gray", "vmin": 0, "vmax": 255}
    with rc_context(STYLE | {"axes.grid": False}):
        lines, row = textwrap.wrap(title, 25 * len(headings)), 2.45 * height / width  # inches
        high = 0.4 + 0.2 * len(lines) + row * len(rows)
        figure = Figure(figsize=(2.5 * len(headings), high))
        figure.suptitle("\n".join(lines), parse_math=False)
        places = figure.subplots(len(rows), len(headings), squeeze=False)
        for (first, *others), (name, pixels, maps) in zip(places, rows, strict=True):
            first.imshow(pixels.squeeze(), **gray)
            first.set_ylabel(_short(Path(name).name, int(12 * row)), parse_math=False)
            for axes, values in zip(others, maps.values(), strict=True):
                axes.imshow(pixels.mean(2), **gray)
                axes.imshow(values, "inferno", alpha=0.6, extent=over, interpolation="bilinear")
        for axes in places.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, heading in zip(places[0], headings, strict=True):
            axes.set_title(heading)
        figure.savefig(path, format="png", dpi=150)


def _short(name: str, most: int) -> str:
    """A file's name as it can be drawn, in at most so many characters."""
    name = name.encode(errors="backslashreplace").decode()
    return name if len(name) <= most else f"{name[: most - 1]}…"
