"""The race of benchmarks.cpu_race: its tables for the manual and the README, and a plot of bars."""

from html import escape
from pathlib import Path

from benchmarks.cpu_race import figures
from benchmarks.cpu_race.contenders import BASELINE, CONTENDERS
from benchmarks.cpu_race.machine import Load

from .readme import with_block

BEGIN, END = "<!-- cpu-race: begin -->", "<!-- cpu-race: end -->"
PAGE = Path("docs", "results", "cpu.md")  # of the checkout
NOTHING = "No CPU has been measured yet."
WITHIN = 0.97  # of the fastest: as fast, by this measure
# shown as ours; the others are other people's
OURS = ("ours", "ours-compile", "ours-engine")


def read_races(results: Path) -> dict[str, dict]:
    """The race of each folder of results that has one, by the folder's name.

    Raises:
        CorruptRace: A file is damaged.
    """
    return {p.parent.name: figures.load(p) for p in sorted(results.glob("*/race.json"))}


def renewed(root: Path, results: Path) -> dict[Path, tuple[str, str]]:
    """The files of the manual that the races decide: what each holds, and what it should.

    Args:
        root: The checkout, or another folder with a `docs/`; without the page there is nothing.
        results: The folder of the chips' folders.

    Raises:
        CorruptRace: A file is damaged.
        ValueError: The page lacks its comments.
    """
    page = root / PAGE
    if not page.exists():
        return {}
    races, text = read_races(results), page.read_text()
    files = {page: (text, with_block(text, tables(races), BEGIN, END, str(page)))}
    for name, race in races.items():
        plot = page.with_name(_plot_name(name))
        files[plot] = (plot.read_text() if plot.exists() else "", draw(race))
    return files


def _plot_name(folder):
    return f"race-{folder}.svg"


def tables(races: dict[str, dict]) -> str:
    """The plot and a table for each cell, in Markdown; the manual's block."""
    parts = []
    for folder, race in races.items():
        machine = race["machine"]
        parts.append(f"### {machine['cpu']}, {machine['cores']} cores, {machine['isa']}")
        parts.append(f"![images/s, in multiples of timm's eager model]({_plot_name(folder)})")
        parts += [_table(cell) for cell in _in_order(race)]
    return "\n\n".join(parts) or NOTHING


# the README's columns, which shows fewer
SHORT = {
    "compile": "compile", "compile-freezing": "compile, frozen", "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO", "ours": "ours", "ours-compile": "ours, compile",
    "ours-engine": "ours, engine",
}  # fmt: skip


def readme_table(races: dict[str, dict]) -> str:
    """One table for each CPU, a line for each cell, in Markdown; "" without any race."""
    parts = []
    for race in races.values():
        machine, cells = race["machine"], _in_order(race)
        days = " to ".join(sorted({min(c["date"] for c in cells), max(c["date"] for c in cells)}))
        lines = [
            f"Measured on a CPU ({machine['cpu']}, {machine['cores']} cores, {machine['isa']}, "
            f"{days}), fp32: images/s in multiples of timm's eager model. No Triton kernel runs on "
            f"a CPU, so this says nothing about a GPU. Spreads, times, versions: [DeiT on a "
            f"CPU]({PAGE}).",
            "",
            "| network | batch | " + " | ".join(SHORT.values()) + " |",
            "|---|---:|" + "---:|" * len(SHORT),
        ]
        for cell in cells:
            rows = {r["contender"]: r for r in cell["rows"] if r["status"] == "measured"}
            found = [_times(cell, rows[name]) if name in rows else "–" for name in SHORT]
            load = Load(cell["load_average"], cell["other_percent"], cell["steal_percent"])
            batch = f"{cell['batch']}, disturbed" if load.warning else str(cell["batch"])
            lines.append("| " + " | ".join([cell["network"], batch, *found]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _times(cell, row):
    """The ratio to timm's eager model; bold where it is the fastest, or within 3% of it."""
    speed = f"{row['ratio_median']:.2f}"
    return f"**{speed}**" if row["ratio_median"] >= WITHIN * _fastest(cell) else speed


def _in_order(race):
    """Cells by size and batch, as a reader looks for them."""
    order = ["DeiT-Ti distilled", "DeiT-S distilled", "DeiT-B distilled"]

    def key(cell):
        known = cell["network"] in order
        return order.index(cell["network"]) if known else len(order), cell["batch"]

    return sorted(race["cells"], key=key)


def _table(cell):
    versions = ", ".join(f"{n} {v}" for n, v in cell["versions"].items() if v)
    load = Load(cell["load_average"], cell["other_percent"], cell["steal_percent"])
    title = (
        f"**{cell['network']}, batch {cell['batch']}**, fp32, {cell['threads']} threads, "
        f"{cell['rounds']} rounds, {cell['date']}, commit {cell['commit'][:7]}; {versions}. "
        f"Load average {load.load_average:.2f}, other processes {load.other_percent:.1f}% of the "
        f"CPU time, steal {load.steal_percent:.1f}%."
    )
    if load.warning:
        title += f" **Disturbed: {load.warning}.**"
    lines = [
        "| | ms | p20 to p80 | images/s | times eager | p20 to p80 | CPU ms | largest error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in cell["rows"]:
        name = CONTENDERS.get(row["contender"], (row["contender"],))[0]
        if row["status"] != "measured":
            note = (row["note"] or "").replace("|", "\\|")
            lines.append(f"| {name} | {row['status']}: {note} | | | | | | |")
            continue
        lines.append(
            f"| {name} | {row['ms_median']:.1f} | {row['ms_p20']:.1f} to {row['ms_p80']:.1f} "
            f"| {row['images_per_s']:.1f} | {_times(cell, row)} | {row['ratio_p20']:.2f} to "
            f"{row['ratio_p80']:.2f} | {row['cpu_ms']:.1f} | {row['relative_error']:.0e} |"
        )
    return "\n".join([title, "", *lines])


def _fastest(cell):
    return max(r["ratio_median"] for r in cell["rows"] if r["status"] == "measured")


STYLE = """
 text { font: 12px sans-serif; fill: #24292f } .name { text-anchor: end }
 .head { font-weight: bold } .ours { fill: #2f81f7 } .other { fill: #8c959f }
 .line { stroke: #24292f; stroke-width: 1 } .spread { stroke: #57606a; stroke-width: 1.5 }
 @media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .line { stroke: #e6edf3 } .spread { stroke: #c9d1d9 } }
"""
LEFT, WIDTH, BAR, ROW, GAP = 260, 720, 13, 19, 36


def draw(race: dict) -> str:
    """Bars of the ratio to timm's eager model, p20 to p80 as a line: an SVG, light and dark."""
    cells = _in_order(race)
    rows = [r for c in cells for r in c["rows"] if r["status"] == "measured"]
    most = max((max(r["ratio_p80"], r["ratio_median"]) for r in rows), default=1.0)
    scale = (WIDTH - LEFT - 60) / most
    parts, y = [], 0
    for cell in cells:
        y += GAP
        parts.append(
            f'<text class="head" x="8" y="{y - 8}">{escape(cell["network"])}, batch '
            f"{cell['batch']}: times timm's eager model</text>"
        )
        top = y
        for row in cell["rows"]:
            if row["status"] != "measured":
                continue
            parts += _bar(row, y, scale)
            y += ROW
        one = LEFT + scale
        parts.append(f'<line class="line" x1="{one:.1f}" x2="{one:.1f}" y1="{top - 2}" y2="{y}"/>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 12}" '
        f'width="{WIDTH}" role="img" aria-label="{escape(race["machine"]["cpu"])}">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _bar(row, y, scale):
    name = escape(CONTENDERS.get(row["contender"], (row["contender"],))[0])
    kind = "ours" if row["contender"] in OURS else "other"
    low, median, high = (LEFT + scale * row[f"ratio_{n}"] for n in ("p20", "median", "p80"))
    middle = y + BAR / 2
    yield f'<text class="name" x="{LEFT - 8}" y="{y + BAR - 2}">{name}</text>'
    yield (f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{median - LEFT:.1f}" height="{BAR}"/>')
    if row["contender"] != BASELINE:
        yield f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
    yield (
        f'<text x="{max(median, high) + 6:.1f}" y="{y + BAR - 2}">{row["ratio_median"]:.2f}</text>'
    )
