"""Plots of the analyses. Importing this needs matplotlib."""

from pathlib import Path

import numpy as np

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ImportError as error:
    raise RuntimeError(
        "plots: matplotlib is missing, want pip install 'deit_fast[train]'"
    ) from error

STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "figure.constrained_layout.use": True,
}  # fmt: skip


def matrix(names: list[str], values: np.ndarray, title: str, path: str | Path) -> None:
    """A heat map (n, n) with the figure in each cell, as a PNG."""
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
    """Values in their order, each with its name below, as a PNG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4))
        axes = figure.subplots()
        axes.plot(list(points), list(points.values()), marker="o")
        axes.tick_params(axis="x", rotation=45)
        axes.set_ylabel(what)
        axes.set_title(title)
        figure.savefig(path, format="png", dpi=150)
