"""Table 5 here beside the paper's figures: the same cells for a terminal and for the manual."""

from collections.abc import Iterator

from rich.table import Table

from benchmarks.measured import Chip, rank_correlation, ratio
from benchmarks.table5 import ENTRIES, Entry
from deit_fast.bench import tables
from deit_fast.bench.measure import FEWEST
from deit_fast.bench.results import ModelRow

BEGIN, END = "<!-- table5-cpu: begin -->", "<!-- table5-cpu: end -->"
NOTHING = "No CPU has been measured yet."
MODES = {
    "eager_fp32": "eager fp32", "deit_fast_fp32": "deit_fast fp32", "eager_bf16": "eager bf16",
    "compile_bf16": "compile bf16", "compile_max_autotune_bf16": "max-autotune bf16",
    "deit_fast_bf16": "deit_fast bf16", "deit_fast_engine_bf16": "engine bf16",
}  # fmt: skip
RATIOS = {"deit_fast_fp32": "eager_fp32", "deit_fast_bf16": "eager_bf16",
          "deit_fast_engine_bf16": "compile_max_autotune_bf16"}  # fmt: skip
FAMILIES = {"convnet": "convolutional networks", "transformer": "transformers"}


def cells(chip: Chip, entries: list[Entry], protocol: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, as text.

    Modes of which nothing was measured have no column, networks of which nothing was measured no
    row. A figure is images/s with its spread, (p80 - p20) / median.

    Args:
        chip: What was measured; rows of older builds do not count.
        entries: Rows of Table 5.
        protocol: By which the rows here were measured.
    """
    found = {e: {mode: _row(chip, e, mode, protocol) for mode in MODES} for e in entries}
    found = {e: rows for e, rows in found.items() if any(rows.values())}
    shown = [
        mode
        for mode in MODES
        if any(rows[mode] and rows[mode].status == "measured" for rows in found.values())
    ]
    pairs = {mode: base for mode, base in RATIOS.items() if {mode, base} <= set(shown)}
    headings = [
        "network", "pixels", "paper, V100", *[MODES[mode] for mode in shown],
        *[f"{MODES[mode].rpartition(' ')[0]} / {MODES[base]}" for mode, base in pairs.items()],
        "batch",
    ]  # fmt: skip
    lines = []
    for entry, rows in found.items():
        batches = dict.fromkeys(r.batch for mode in shown if (r := rows[mode]))
        lines.append([
            entry.network, str(entry.image_size), f"{entry.v100_images_per_s:,.1f}",
            *[_figure(rows[mode]) for mode in shown],
            *[_times(rows[mode], rows[base]) for mode, base in pairs.items()],
            ", ".join(map(str, batches)),
        ])  # fmt: skip
    return headings, lines


def _row(chip: Chip, entry: Entry, mode: str, protocol: str) -> ModelRow | None:
    row = chip.row(entry, mode, protocol)
    return row if row and not chip.is_old(row) else None


def _figure(row: ModelRow | None) -> str:
    if row is None:
        return "–"
    if row.status != "measured":
        return row.status
    spread = (row.ms_p80 - row.ms_p20) / row.ms_median
    return f"{_rounded(row.images_per_s)} ({spread:.0%})"


def _rounded(images_per_s: float) -> str:
    for least, digits in ((100, 0), (10, 1)):
        if images_per_s >= least:
            return f"{images_per_s:,.{digits}f}"
    return f"{images_per_s:.2f}"


def _times(row: ModelRow | None, base: ModelRow | None) -> str:
    """Of calls in turn, where the row has that."""
    if row and base and row.speedup is not None and row.baseline == base.mode:
        return f"{row.speedup:.2f}"
    times = ratio(row, base)
    return "–" if times is None else f"{times:.2f}"


def correlations(chip: Chip, entries: list[Entry], protocol: str) -> str:
    """Rank correlations with the paper, of all networks and of each family; "" without any."""
    groups = {"networks": entries}
    groups |= {name: [e for e in entries if e.family == of] for of, name in FAMILIES.items()}
    found = {name: rank_correlation(chip, of, protocol) for name, of in groups.items()}
    said = [f"{r[0]:.3f} over {r[1]} {name}" for name, r in found.items() if r]
    if not said:
        return ""
    return (
        f"Rank correlation (Spearman) of eager fp32 here with the paper's V100: {', '.join(said)}."
    )


def for_terminal(chip: Chip, entries: list[Entry]) -> Iterator[Table | str]:
    """A table and the rank correlations, to print; nothing where nothing was measured."""
    headings, lines = cells(chip, entries, chip.protocol)
    if not lines:
        return
    title = "Table 5: images/s beside the paper's (DeiT, fp32, largest batch); spread in brackets"
    yield tables.listed(title, headings, lines)
    yield correlations(chip, entries, chip.protocol) or (
        "fewer than three networks measured: no rank correlation with the paper"
    )


def for_manual(chips: list[Chip]) -> str:
    """Table 5 on every CPU that was measured by the protocol "batch", in Markdown."""
    parts = [part for chip in chips if chip.is_cpu for part in _page_part(chip)]
    return "\n\n".join(parts) or NOTHING


def _page_part(chip: Chip) -> Iterator[str]:
    if "table5" not in chip.files:
        return
    chip = Chip(chip.folder, {"table5": chip.files["table5"]})
    entries = list(ENTRIES)
    headings, lines = cells(chip, entries, "batch")
    if not lines:
        return
    newest, hardware = chip.newest, chip.newest.hardware
    yield f"## {hardware['cpu']}, {hardware['threads']} threads"
    yield (
        f"torch {hardware['torch']}, timm {hardware['timm']}, Python {hardware['python']}, "
        f"{newest.date}, commit {newest.commit[:7]}. Median of {newest.protocol['runs']} timed "
        f"calls, of slow networks at least {FEWEST}."
    )
    yield correlations(chip, entries, "batch")
    yield "\n".join([
        f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1),
        *[f"| {' | '.join(line)} |" for line in lines],
    ])  # fmt: skip
