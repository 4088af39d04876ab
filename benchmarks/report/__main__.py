"""The README's tables, a page and plots for every chip, from the results files.

python -m benchmarks.report            report.html and PNGs beside each chip's files, README, manual
python -m benchmarks.report --check    are the README and the manual what the files say?
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.measured import Chip
from deit_fast.bench.results import CorruptResults, paths

from . import comparison, race
from .readme import readme_tables, with_block, with_tables

ROOT = Path(__file__).parents[2]
TABLE5_CPU = Path("docs", "results", "table5_cpu.md")  # beside the README


def read_chips(folder: Path) -> list[Chip]:
    """One for each folder with results.

    Raises:
        CorruptResults: A file is damaged; the message names it.
    """
    folders = [path for path in sorted(folder.glob("*/")) if paths(path)]
    return [Chip.read(path) for path in folders]


def write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: it is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    """Write or check the report; 1 where --check finds a difference, 2 where a file is damaged."""
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
        tables = (readme_tables(chips), race.readme_table(race.read_races(args.results)))
        changed = {args.readme: (readme, with_tables(readme, "\n\n".join(filter(None, tables))))}
        page = args.readme.parent / TABLE5_CPU
        if page.exists():  # a README elsewhere, of a rehearsal, has no manual beside it
            text, block = page.read_text(), comparison.for_manual(chips)
            new = with_block(text, block, comparison.BEGIN, comparison.END, str(page))
            changed[page] = (text, new)
        changed |= race.renewed(args.readme.parent, args.results)
    except (CorruptResults, ValueError, FileNotFoundError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    changed = {path: new for path, (old, new) in changed.items() if new != old}
    if args.check:
        for path in changed:
            print(f"report: {path} is not what the results say; run without --check")
        return int(bool(changed))

    from . import page as html_page  # matplotlib takes a second
    from . import plots

    for chip in chips:
        drawn = plots.draw(chip)
        for name, (_, png) in drawn.items():
            write(chip.folder / f"{name}.png", png)
        html = html_page.render(chip, {name: svg for name, (svg, _) in drawn.items()})
        write(chip.folder / "report.html", html.encode())
        print(f"{chip.name}: {chip.folder / 'report.html'}")
    for path, text in changed.items():
        write(path, text.encode())
        print(f"{path}: renewed")
    if not chips:
        print(f"no results in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
