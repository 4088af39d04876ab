"""Colours of both schemes, the frame of a picture, and its SVG.

An SVG has each colour as a CSS variable with a value for light and for dark pages, which the
browser chooses by `prefers-color-scheme`; the background is transparent. Texts stay texts, in the
reader's sans-serif font. The description, for those who do not see the picture, is its data.
"""

import base64
import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

# name -> on light, on dark: Okabe and Ito's hues, each with enough contrast for its background.
# Figures are drawn in the light ones, so these have to differ.
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9ba5b0"),
    "grid": ("#d5dae0", "#343b44"),
    "blue": ("#0072b2", "#56b4e9"),
    "vermillion": ("#c84e00", "#ff8f50"),
    "green": ("#007a5a", "#2cc79a"),
    "purple": ("#a03d7c", "#e495c4"),
    "orange": ("#946200", "#eeb12e"),
    "teal": ("#007d91", "#4fc9dd"),
    "black": ("#3b3b3b", "#c4c4c4"),
}
INK, MUTED, GRID, BLUE, VERMILLION, GREEN, PURPLE, ORANGE, TEAL, BLACK = (
    light for light, _ in COLOURS.values()
)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8, "axes.labelcolor": MUTED, "axes.facecolor": "none",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "figure.facecolor": "none", "lines.linewidth": 1.6, "lines.markersize": 5.5,
    "svg.fonttype": "none", "svg.hashsalt": "deit_fast", "image.composite_image": False,
}  # fmt: skip
MARGIN = 0.16  # inches
TOP = 0.88  # inches of headline and what is below it
WIDTH = 8.0


@dataclass(frozen=True)
class Picture:
    """A figure with what it says in words.

    Attributes:
        figure: In the colours for light pages.
        title: One line.
        description: All that the figure shows, for those who do not see it.
    """

    figure: Figure
    title: str
    description: str


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's settings for pictures."""
    with rc_context(STYLE):
        yield


def frame(height: float, headline: str, below: str) -> Figure:
    """A figure with a headline and a line or two in gray below it, no axes yet."""
    figure = Figure(figsize=(WIDTH, height))
    top = 1 - MARGIN / height
    figure.text(MARGIN / WIDTH, top, headline, va="top", fontsize=13, fontweight="bold")
    figure.text(
        MARGIN / WIDTH, top - 0.27 / height, below, va="top", fontsize=9.5, color=MUTED,
        linespacing=1.35,
    )  # fmt: skip
    return figure


def panels(
    figure: Figure, count: int, left: float = 0.72, gap: float = 0.72, bottom: float = 0.56,
    right: float = MARGIN, top: float = TOP,
) -> list[Axes]:  # fmt: skip
    """Axes of one width beside each other; margins in inches."""
    width, height = figure.get_size_inches()
    each = (width - left - right - gap * (count - 1)) / count
    return [
        figure.add_axes((
            (left + i * (each + gap)) / width, bottom / height,
            each / width, (height - top - bottom) / height,
        ))
        for i in range(count)
    ]  # fmt: skip


def rows(figure: Figure, count: int, each: float, left: float = 0.72) -> list[Axes]:
    """Axes as wide as the figure below each other, the first at the top; `each` inches high.

    That includes the axis below and a heading of two lines above.
    """
    width, height = figure.get_size_inches()
    return [
        figure.add_axes((
            left / width, ((count - 1 - i) * each + 0.56) / height,
            (width - left - MARGIN) / width, (each - 1.06) / height,
        ))
        for i in range(count)
    ]  # fmt: skip


def heading(axes: Axes, text: str, below: str = "") -> None:
    """A panel's own title, above its left edge, and a line in gray between them."""
    width = axes.get_window_extent().width / axes.figure.dpi
    most = int(width * 72 / 6.6)  # characters
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    at = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 9.5}
    axes.annotate(text, (0, 1), (0, 22 if below else 8), fontweight="bold", color=INK, **at)
    axes.annotate(below, (0, 1), (0, 8), color=MUTED, **at)


def logarithmic(axis: Axis, subs: tuple[int, ...] = (1,)) -> None:
    """Plain numbers at these multiples of each power of ten; on a short axis at 1, 2 and 5."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=subs if high > 30 * low else (1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axis.set_minor_formatter(NullFormatter())


def svg(picture: Picture) -> bytes:
    """The picture as SVG for light and dark pages; the same bytes for the same figure."""
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!DOCTYPE.*?>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- .*? -->\s*", "", text)  # each text once more
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+)px [^;\"]*", _font, text)
    text = re.sub(r"(data:image/png;base64,)([^\"]*)", _plain_png, text)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    text = re.sub(r"-?\d+\.\d{3,}", _rounded, text)
    begin, rest = text.split(">", 2)[1], text.split(">", 2)[2]
    begin = begin.strip() + ' role="img" aria-labelledby="title desc"'
    head = (
        f'<title id="title">{escape(picture.title)}</title>\n'
        f'<desc id="desc">{escape(picture.description)}</desc>\n<style>{_css()}</style>'
    )
    return f"<!-- {drawn_by()} -->\n{begin}>\n{head}{rest}".encode()


def drawn_by() -> str:
    """The library that the bytes depend on, with its version."""
    return f"python -m benchmarks.pictures, matplotlib {matplotlib.__version__}"


def _css():
    light, dark = (
        "".join(f"--{name}:{values[i]};" for name, values in COLOURS.items()) for i in (0, 1)
    )
    return (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"text{{font-family:{FONT}}}"
    )


def _font(found):
    weight = f"font-weight: {found[1]}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}px"


def _rounded(found):
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _plain_png(found):
    """The same pixels, without compression, which differs from machine to machine."""
    image = Image.open(io.BytesIO(base64.b64decode(found[2]))).convert("RGBA")
    width, height = image.size
    pixels = image.tobytes()
    rows = b"".join(b"\0" + pixels[4 * width * y : 4 * width * (y + 1)] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return found[1] + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
