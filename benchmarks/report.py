"""The README's tables, a page and plots for every chip, from the results files.

python -m benchmarks.report            report.html and PNGs beside each chip's files, and README
python -m benchmarks.report --check    is the README what the files say?
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.measured import (
    EIGHT_BITS,
    NOT_ALIKE,
    OURS,
    RIVAL,
    WORK,
    Chip,
    EightBits,
    mark,
    ratio,
)
from benchmarks.table5 import ENTRIES, RELATIVES, distinct
from deit_fast.bench.results import CorruptResults

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING = "No GPU has been measured yet."
COLUMNS = {
    "eager fp32": "eager_fp32", "eager bf16": "eager_bf16",
    "compile max-autotune bf16": "compile_max_autotune_bf16", "deit_fast bf16": "deit_fast_bf16",
    "deit_fast bf16, engine": "deit_fast_engine_bf16",
}  # fmt: skip


TRAINING = {
    "eager AMP": "eager_amp_bf16_train", "compile AMP": "compile_amp_bf16_train",
    "deit_fast AMP": "deit_fast_amp_bf16_train",
    "compile max-autotune AMP": RIVAL, "deit_fast reduce-overhead AMP": OURS,
}  # fmt: skip


def read_chips(folder: Path) -> list[Chip]:
    """One for each folder with results. Raises CorruptResults."""
    folders = [path for path in sorted(folder.glob("*/")) if any(path.glob("*.json"))]
    return [Chip.read(path) for path in folders]


def readme_tables(chips: list[Chip]) -> str:
    """Markdown: a table of inference, one of eight bits and one of training for each GPU; a CPU's
    figures claim nothing and are left out."""
    kinds = (_readme_table, _eight_bits_table, _train_table)
    tables = [table(chip) for chip in chips if not chip.is_cpu for table in kinds]
    return "\n\n".join(filter(None, tables)) or NOTHING


def _readme_table(chip):
    """Ratios are the engine's where it was measured: the plain call may wait for Python."""
    lines, runs = [], set()
    for entry in distinct([*ENTRIES, *RELATIVES]):
        rows = {name: chip.row(entry, mode, "batch") for name, mode in COLUMNS.items()}
        both = (rows["deit_fast bf16, engine"], rows["deit_fast bf16"])
        ours = [r for r in both if r and r.status == "measured" and not chip.is_old(r)]
        if not ours:
            continue
        ours = ours[0]
        speeds = [_speed(chip, r, ours) for r in rows.values()]
        runs.add(ours.runs)
        times = [
            "–" if (x := ratio(ours, rows[base])) is None else f"{x:.2f}"
            for base in ("eager bf16", "compile max-autotune bf16")
        ]
        lines.append("| " + " | ".join([entry.network, str(ours.batch), *speeds, *times]) + " |")
    headings = ["network", "batch", *COLUMNS, "ours / eager", "ours / compile"]
    return _markdown(chip, "images/s", runs, headings, lines)


def _speed(chip, row, base):
    """images/s of a row that `base` can be compared with; else what became of it."""
    if row and row.status != "measured" and not chip.is_old(row):
        return row.status
    return f"{row.images_per_s:,.0f}" if ratio(row, base) else "–"


def _eight_bits_table(chip):
    lines, runs, headings = [], set(), []
    for entry in distinct([*ENTRIES, *RELATIVES]):
        found = EightBits.of(chip, entry)
        if found is None or chip.is_old(found.ours):
            continue
        base = found.base
        runs.add(base.runs)
        speeds = [_speed(chip, r, base) for r in found.rows.values()]
        verdicts = [f"{x:.2f}" if isinstance(x, float) else x or "–" for _, x in found.verdicts]
        lines.append("| " + " | ".join([entry.network, str(base.batch), *speeds, *verdicts]) + " |")
        headings = ["network", "batch", *EIGHT_BITS, *[name for name, _ in found.verdicts]]
    what = (
        "images/s with the products of every Block in eight bits, the rest in bf16; torchao's "
        f"float8 dynamic quantisation by row under torch.compile. Not alike: {NOT_ALIKE}"
    )
    return _markdown(chip, what, runs, headings, lines)


def _train_table(chip):
    lines, runs = [], set()
    for entry in distinct([*ENTRIES, *RELATIVES]):
        for protocol, work in WORK.items():
            for batch in chip.batches(entry, protocol, train=True):
                rows = [chip.row(entry, mode, protocol, batch) for mode in TRAINING.values()]
                rival, ours = rows[-2:]
                if ours is None or ours.status != "measured" or chip.is_old(ours):
                    continue
                runs.add(ours.runs)
                speeds = [_speed(chip, r, ours) for r in rows]
                times = ratio(ours, rival)
                memory = [
                    f"{r.peak_memory_gb:.2f}" if ratio(r, ours) and r.peak_memory_gb else "–"
                    for r in (rival, ours)
                ]
                lines.append("| " + " | ".join([
                    entry.network, work, str(batch), *speeds,
                    "–" if times is None else f"{times:.2f}", mark(entry, ours, rival) or "–",
                    *memory,
                ]) + " |")  # fmt: skip
    headings = [
        "network", "work", "batch", *TRAINING, "reduce-overhead / max-autotune",
        "wanted of an H100 or H200", "GB max-autotune", "GB reduce-overhead",
    ]  # fmt: skip
    what = "images/s in training, fp32 weights, bf16 autocast; a full step has fused AdamW"
    return _markdown(chip, what, runs, headings, lines)


def _markdown(chip, what, runs, headings, lines):
    if not lines:
        return ""
    newest = chip.newest
    title = (
        f"{chip.name}, torch {newest.hardware['torch']}, triton {newest.hardware['triton']}, "
        f"{newest.date}, commit {newest.commit[:7]}: {what}, median of at least {min(runs)} "
        "calls, all at that batch and by one build."
    )
    table = [
        "| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1), *lines,
    ]  # fmt: skip
    return "\n".join([title, "", *table])


def with_tables(readme: str, tables: str) -> str:
    """The README's text with what lies between the marks replaced. Raises ValueError without."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def write(path: Path, content: bytes) -> None:
    """To a temporary name, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    args = parser.parse_args(argv)
    try:
        chips = read_chips(args.results)
        readme = args.readme.read_text()
        wanted = with_tables(readme, readme_tables(chips))
    except (CorruptResults, ValueError, FileNotFoundError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if args.check:
        if wanted != readme:
            print(f"report: {args.readme} is not what the results say; run without --check")
        return int(wanted != readme)

    from benchmarks import page, plots  # matplotlib takes a second

    for chip in chips:
        drawn = plots.draw(chip)
        for name, (_, png) in drawn.items():
            write(chip.folder / f"{name}.png", png)
        html = page.render(chip, {name: svg for name, (svg, _) in drawn.items()})
        write(chip.folder / "report.html", html.encode())
        print(f"{chip.name}: {chip.folder / 'report.html'}")
    if wanted != readme:
        write(args.readme, wanted.encode())
        print(f"{args.readme}: tables renewed")
    if not chips:
        print(f"no results in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
