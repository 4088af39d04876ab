"""Labels beside points, where they cover neither a point nor another label."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

# where a label may be, the best first: direction, and alignment of the text
PLACES = (
    (1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"),
    (0, -1, "center", "top"), (0.8, 0.8, "left", "bottom"), (0.8, -0.8, "left", "top"),
    (-0.8, 0.8, "right", "bottom"), (-0.8, -0.8, "right", "top"),
)  # fmt: skip
DISTANCES = (6, 9, 13, 18, 24)  # points


@dataclass(frozen=True)
class Label:
    """A label of a point, in data coordinates."""

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False
    needed: bool = True  # rather on a line, or far from its point, than left out


def place(axes: Axes, labels: Iterable[Label]) -> None:
    """Write labels, each in the first place where it covers no point, no text and no line.

    It is nearer to its own point than to others. Where there is no such place, a label that is
    needed may lie on a line; others are left out.

    Args:
        axes: With limits and scales that stay, and all its lines.
        labels: In the order in which they choose.
    """
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    inside = axes.get_window_extent(renderer)
    points, lines = _covered(axes, renderer.points_to_pixels(1))
    taken = points + [text.get_window_extent(renderer) for text in axes.texts]
    others = np.array([((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in points])
    for label in labels:
        at = axes.transData.transform([(label.x, label.y)])

        def nearest(box, at=at):
            return _distances(box, at)[0] <= _distances(box, others).min() + 0.5

        attempts = ((lines, nearest), ([], nearest), ([], lambda box: True))
        any(
            _written(axes, label, distance, renderer, inside, (*taken, *avoided), taken, good)
            for avoided, good in attempts[: 3 if label.needed else 1]
            for distance in DISTANCES
        )


def _covered(axes, pixels):
    """Boxes of the points, and along the lines between them."""
    points, lines = [], []
    for line in axes.get_lines():
        places = axes.transData.transform(line.get_xydata())
        if line.get_marker() not in ("None", "", None):
            points += [_box(*place, 3.5 * pixels) for place in places]
        if line.get_linestyle() in ("None", "", None):
            continue
        for a, b in zip(places, places[1:], strict=False):
            steps = max(int(np.hypot(*(b - a)) / (3 * pixels)), 1)
            lines += [_box(*(a + (b - a) * i / steps), 0.8 * pixels) for i in range(steps + 1)]
    return points, lines


def _written(axes, label, distance, renderer, inside, avoided, taken, good):
    for dx, dy, ha, va in PLACES:
        text = axes.annotate(
            label.text, (label.x, label.y), (dx * distance, dy * distance),
            textcoords="offset points", ha=ha, va=va, color=label.colour, fontsize=8,
            fontweight="bold" if label.bold else "normal",
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        within = inside.x0 <= box.x0 and box.x1 <= inside.x1
        within = within and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if within and good(box) and not any(box.overlaps(other) for other in avoided):
            taken.append(box)
            return True
        text.remove()
    return False


def _distances(box, places):
    """Of a box's edge from each place (n, 2)."""
    x, y = places.T
    dx = np.maximum(np.maximum(box.x0 - x, x - box.x1), 0)
    return np.hypot(dx, np.maximum(np.maximum(box.y0 - y, y - box.y1), 0))


def _box(x, y, r):
    return Bbox.from_extents(x - r, y - r, x + r, y + r)


def collisions(figure: Figure) -> list[str]:
    """Texts that overlap each other or leave the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = {id(label) for axes in figure.axes for label in _outside(axes)}
    boxes = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and id(text) not in hidden
    ]
    width, height = canvas.get_width_height()
    found = [
        f"{name!r} leaves the figure"
        for name, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]
    for (a, one), (b, other) in combinations(boxes, 2):
        common = Bbox.intersection(one, other)
        if common is not None and common.width > 1 and common.height > 1:
            found.append(f"{a!r} overlaps {b!r}")
    return found


def _outside(axes):
    """Labels of ticks that lie outside the axis, which are not drawn."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)
