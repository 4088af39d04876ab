"""The charts of the report, as SVG inside the page: its style sheet has their colours.

A chart has a description for those who do not see it, and its legend is text of the page.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 40
COLOURS = 6  # classes c0, c1, ... of the style sheet


class _Frame:
    """Axes with ticks, and where a point lies in them."""

    def __init__(self, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str):
        self.x, self.y = _span(x), _span(y)
        self.parts = [
            f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" '
            f'text-anchor="middle">{escape(x_label)}</text>',
            f'<text class="label" transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) '
            f'rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
        ]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    def add_ticks(self, xs: Iterable[float], ys: Iterable[float]) -> None:
        for y in ys:
            x, at = self.at(self.x[0], y)
            self.parts.append(
                f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
                f'<text x="{x - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{number(y)}</text>'
            )
        for x in xs:
            at, bottom = self.at(x, self.y[0])
            self.parts.append(
                f'<text x="{at:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{number(x)}</text>'
            )

    def bar(self, kind: str, x0: float, x1: float, y0: float, y1: float) -> None:
        (left, low), (right, high) = self.at(x0, y0), self.at(x1, y1)
        self.parts.append(
            f'<rect class="{kind}" x="{left + 0.5:.1f}" y="{min(high, low):.1f}" '
            f'width="{max(right - left - 1, 0.5):.1f}" height="{abs(low - high):.1f}"/>'
        )

    def line(self, kind: str, points: Sequence[tuple[float, float]]) -> None:
        at = [self.at(*point) for point in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        self.parts.append(f'<path class="line {kind}" d="M{path}"/>')
        if len(at) <= 12:
            self.parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
                           for x, y in at]  # fmt: skip

    def svg(self, description: str) -> str:
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
            f"{''.join(self.parts)}</svg>"
        )


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], what: str, percent: bool = False
) -> str:
    """Draw lines over epochs.

    Args:
        series: {name: (epoch, value) in order}; at least one has points.
        what: The values are, at their axis.
        percent: Whether the axis ends at 100 at most.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    frame = _Frame(xs, ys, "epoch", what)
    x_ticks = [x for x in ticks(*frame.x, 6) if x == int(x)]
    y_ticks = ticks(*frame.y, 5)
    frame.y = min(frame.y[0], y_ticks[0]), max(frame.y[1], y_ticks[-1])
    if percent:
        frame.y = max(frame.y[0], 0.0), min(frame.y[1], 100.0)
        y_ticks = [y for y in y_ticks if frame.y[0] <= y <= frame.y[1]]
    frame.add_ticks(x_ticks, y_ticks)
    for place, points in enumerate(series.values()):
        if points:
            frame.line(f"c{place % COLOURS}", points)
    said = "; ".join(
        f"{name}: {number(points[0][1])} to {number(points[-1][1])}"
        for name, points in series.items()
        if points
    )
    return (
        f"<figure>{frame.svg(f'{what} over epochs. {said}')}{legend(list(series), what)}</figure>"
    )


def legend(names: Sequence[str], title: str) -> str:
    """Name the lines of a chart."""
    items = "".join(
        f'<span class="key"><i class="c{i % COLOURS}"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f"<figcaption><b>{escape(title)}</b> {items if len(names) > 1 else ''}</figcaption>"


def reliability(bins: Mapping[str, list], title: str) -> str:
    """Draw a reliability diagram (Guo et al. 2017, figure 1).

    Args:
        bins: What `evaluation.reliability` returned.
        title: Below it.
    """
    frame = _Frame((0, 1), (0, 1), "confidence", "accuracy")
    frame.add_ticks((0, 0.25, 0.5, 0.75, 1), (0, 0.25, 0.5, 0.75, 1))
    said, most = [], max(bins["count"])
    rows = zip(*(bins[k] for k in ("low", "high", "count", "confidence", "accuracy")), strict=True)
    for low, high, count, confidence, accuracy in rows:
        if count:
            frame.bar("bar", low, high, 0, min(accuracy, confidence))
            kind = "over" if confidence > accuracy else "under"
            frame.bar(kind, low, high, min(accuracy, confidence), max(accuracy, confidence))
            # how many images it stands for, along the axis
            frame.bar("count", low, high, 0, 0.06 * count / most)
            said.append(f"{confidence:.2f} confident, {accuracy:.2f} correct, {count} images")
    frame.line("ideal", [(0, 0), (1, 1)])
    return (
        f"<figure>{frame.svg(f'{title}. ' + '; '.join(said))}"
        f"<figcaption><b>{escape(title)}</b></figcaption></figure>"
    )


def histogram(
    groups: Mapping[str, Sequence[float]], mark: float, what: str, title: str, bins: int = 24
) -> str:
    """Draw how values of groups are spread, each group's share in each bin, and a mark.

    Args:
        groups: {name: values}; at least one has values.
        mark: A value that is marked.
        what: The values are, at their axis.
        title: Below it.
        bins: How many.
    """
    every = [v for values in groups.values() for v in values] + [mark]
    low, high = _span(every)
    shares = {}
    for name, values in groups.items():
        count = [0] * bins
        for v in values:
            count[min(int((v - low) / (high - low) * bins), bins - 1)] += 1
        shares[name] = [n / len(values) for n in count] if values else []
    frame = _Frame((low, high), (0, max(s for of in shares.values() for s in of)), what, "share")
    frame.add_ticks(ticks(low, high, 6), ticks(*frame.y, 5))
    for place, of in enumerate(shares.values()):
        steps = [(low, 0.0)]
        for i, share in enumerate(of):
            left, right = (low + (high - low) * k / bins for k in (i, i + 1))
            steps += [(left, share), (right, share)]
        if of:
            frame.line(f"c{place}", [*steps, (high, 0.0)])
    frame.line("mark", [(mark, frame.y[0]), (mark, frame.y[1])])
    said = "; ".join(f"{name}: {len(values)} images" for name, values in groups.items())
    svg = frame.svg(f"{title}. {said}; threshold {number(mark)}")
    return f"<figure>{svg}{legend(list(groups), title)}</figure>"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most about so many."""
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as short as it can be said."""
    if value and abs(value) < 1e-2:
        digits, power = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    return low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
