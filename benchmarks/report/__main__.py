"""The README's tables, a page and plots for every chip, from the results files.

python -m benchmarks.report            report.html and PNGs beside each chip's files, and README
python -m benchmarks.report --check    is the README what the files say?
"""

import argparse
import os
import sys
from pathlib import Path

from deit_fast.bench.results import CorruptResults, paths

from . import race
from .measured import Chip
from .readme import readme_tables, with_tables

ROOT = Path(__file__).parents[2]


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
        expected = with_tables(readme, readme_tables(chips))
        # a README elsewhere, of a rehearsal, has no manual beside it
        manual = race.renewed(args.readme.parent, args.results)
    except (CorruptResults, ValueError, FileNotFoundError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    stale = {path: new for path, (old, new) in manual.items() if new != old}
    if args.check:
        for path in stale:
            print(f"report: {path} is not what the results say; run without --check")
        if expected != readme:
            print(f"report: {args.readme} is not what the results say; run without --check")
        return int(expected != readme or bool(stale))

    from . import page, plots  # matplotlib takes a second

    for chip in chips:
        drawn = plots.draw(chip)
        for name, (_, png) in drawn.items():
            write(chip.folder / f"{name}.png", png)
        html = page.render(chip, {name: svg for name, (svg, _) in drawn.items()})
        write(chip.folder / "report.html", html.encode())
        print(f"{chip.name}: {chip.folder / 'report.html'}")
    if expected != readme:
        write(args.readme, expected.encode())
        print(f"{args.readme}: tables renewed")
    for path, text in stale.items():
        write(path, text.encode())
        print(f"{path}: renewed")
    if not chips:
        print(f"no results in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
