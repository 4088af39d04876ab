"""Draw docs/pictures: SVGs for light and dark pages, from results files, predictions and studies.

    python -m benchmarks.pictures            write them
    python -m benchmarks.pictures --check    are they what the data say? 1 where one is not
    python -m benchmarks.pictures --report   screenshots of the HTML report, by Chromium

Nothing here is measured: what a results file does not have is left out, or predicted and called
so. Bytes depend on matplotlib's version, which each file names: with another version --check
compares the texts, which hold every figure.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.measured import Chip
from benchmarks.report.__main__ import ROOT, read_chips, write
from deit_fast.bench.results import CorruptResults

TEXTS = ("title", "desc", "text")


def main(argv: list[str] | None = None) -> int:
    """Write or check; 1 where --check finds a difference, 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--studies", type=Path, default=ROOT / "docs" / "studies")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="pictures, without .svg")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    parser.add_argument("--report", action="store_true", help="the report's screenshots instead")
    args = parser.parse_args(argv)
    try:
        chips = read_chips(args.results)
        if args.report:
            from .screenshots import take

            for path in take(chips, args.out):
                print(path)
            return 0
        pictures = _pictures(chips, args.studies)
        for name in args.only or ():
            if name not in pictures:
                raise ValueError(f"--only: {name!r}, expected one of {', '.join(pictures)}")
    except (CorruptResults, ValueError, OSError) as error:
        print(f"pictures: {error}", file=sys.stderr)
        return 2
    chosen = {name: draw for name, draw in pictures.items() if name in (args.only or pictures)}
    return _check(chosen, args) if args.check else _write(chosen, args.out)


def _pictures(chips: list[Chip], folder: Path) -> dict[str, Callable]:
    """{name: what draws it}."""
    from . import attention, latency, roofline, studies, throughput  # matplotlib takes a second

    fashion, store, curves = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("fashion_mnist", "store", "curves")
    )
    with_models = [chip for chip in chips if throughput.has_rows(chip)]
    return {
        "throughput": lambda: throughput.draw(with_models),
        "latency": lambda: latency.draw([chip for chip in chips if latency.has_rows(chip)]),
        "roofline": lambda: roofline.draw(chips),
        "training": lambda: studies.training(curves),
        "fashion_mnist_top1": lambda: studies.top1(fashion),
        "fashion_mnist_disagreement": lambda: studies.disagreement(fashion),
        "fashion_mnist_tokens": lambda: studies.tokens(fashion),
        "store_top1": lambda: studies.store(store),
        "attention": attention.draw,
    }


def _draw(draw: Callable) -> bytes:
    from . import style

    with style.drawing():
        return style.svg(draw())


def _write(pictures, out):
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        write(out / f"{name}.svg", _draw(draw))
        print(out / f"{name}.svg")
    return 0


def _check(pictures, args):
    stale = []
    for name, draw in pictures.items():
        path = args.out / f"{name}.svg"
        if not path.exists():
            stale.append(f"{path} is missing")
        elif not same(path.read_bytes(), _draw(draw)):
            stale.append(f"{path} is not what the data say")
    for line in stale:
        print(f"pictures: {line}; run python -m benchmarks.pictures")
    return int(bool(stale))


def same(found: bytes, expected: bytes) -> bool:
    """Whether one SVG is the other: byte for byte, of another matplotlib by its texts."""
    if found.partition(b"\n")[0] == expected.partition(b"\n")[0]:
        return found == expected
    try:
        return texts(found) == texts(expected)
    except ElementTree.ParseError:
        return False


def texts(svg: bytes) -> list[str]:
    """Title, description and every text of an SVG, sorted."""
    names = {f"{{http://www.w3.org/2000/svg}}{name}" for name in TEXTS}
    return sorted(
        "".join(element.itertext())
        for element in ElementTree.fromstring(svg).iter()
        if element.tag in names
    )


if __name__ == "__main__":
    sys.exit(main())
