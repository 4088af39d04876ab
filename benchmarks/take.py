"""Takes what `python -m benchmarks.lease` brought back into the results, README and LOG.md.

examples:
  python -m benchmarks.take FOLDER
  python -m benchmarks.take FOLDER --dry-run       only say what would be taken

Figures go into benchmarks/results, choices into kernels/tuned. The whole folder is checked before
anything is written: it has to be a GPU's, and of the kernels of this checkout. A figure that
cannot be right (above the measured peak rates, an error out of bounds, a kernel that failed its
smoke test) is left out and named; the others are taken, for GPU time is too scarce to drop them.
Taking a folder twice changes nothing. Exit status: 0, or 1 where figures were left out, or 2 where
nothing was taken.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import table5
from benchmarks.lease import check, kernels, models, tuning
from benchmarks.lease.figures import Figure, figures, furthest
from benchmarks.report import __main__ as report
from benchmarks.report.readme import with_tables
from deit_fast import tune
from deit_fast.bench import results
from deit_fast.bench.modes import MODES
from deit_fast.bench.peak_rates import PEAK_RATE_RUNS
from deit_fast.kernels import _chips

ROOT = Path(__file__).parents[1]


def files(lease: check.Lease, folder: Path) -> dict[Path, results.Results]:
    """What the files under benchmarks/results/<chip> become.

    Raises:
        ValueError: One of them is another chip's, or damaged.
    """
    in_table5 = {entry.measured_as for entry in table5.ENTRIES}
    rows: dict[str, list] = {"peak_rates": []}
    for row in lease.models.values():
        name = "table5" if (row.timm_name, row.image_size) in in_table5 else "relatives"
        if row.protocol == "latency":
            name = "latency"
        elif MODES[row.mode].train:
            name = "train"
        rows.setdefault(name, []).append(row)
    for row in lease.kernels.values():
        rows.setdefault("kernels", []).append(row)
    every = [row for of in rows.values() for row in of]
    header = lease.header
    newest = max(every, key=lambda row: row.run or "", default=None)
    build = newest.build if newest else results.build(header["hardware"])
    made = {}
    for name, new in rows.items():
        path = folder / f"{name}.json"
        before = results.load(path).rows if path.exists() else []
        made[path] = results.Results(
            header["hardware"], header["commit"], build, header["started"][:10],
            {"runs": max((row.runs for row in new), default=PEAK_RATE_RUNS),
             "warmup": kernels.WARMUP if name == "kernels" else models.WARMUP[0],
             "timer": "cuda events"},
            lease.peak_rates, before,
        )  # fmt: skip
        for row in new:
            made[path].put(row)
    for path in results.paths(folder):
        old = results.load(path)
        if old.hardware["gpu"] != header["hardware"]["gpu"]:
            raise ValueError(f"{path}: holds results of {old.hardware['gpu']}")
    return made


def table(lease: check.Lease, path: Path) -> str | None:
    """The tuned table at `path` with the choices of the folder's tables, as JSON.

    The later table's choices count. None where the folder has no table.

    Raises:
        ValueError: A table is damaged.
    """
    chip = lease.header["chip"]
    of = _chips.Chip(chip["name"], tuple(chip["capability"]), chip["num_sms"])
    merged, head = {_key(row): row for row in tune.read_rows(path, of)}, None
    for name in (tuning.TABLE, tuning.MORE):
        for row in tune.read_rows(lease.folder / name, of):
            merged[_key(row)] = row
        if (lease.folder / name).exists():
            head = json.loads((lease.folder / name).read_text())
    if head is None:
        return None
    return json.dumps(head | {"choices": list(merged.values())}, indent=1) + "\n"


def _key(row):
    return row["op"], json.dumps(row["shape"], sort_keys=True)


def log_lines(lease: check.Lease, found: list[Figure], before: str) -> list[str]:
    """The lines that LOG.md does not have yet."""
    there, chip = set(before.splitlines()), lease.header["chip"]["name"]
    lines = [f"- {of.run[:10]}, {chip}, {of.commit[:12]}: {of}" for of in found]
    return [line for line in lines if line not in there]


def run(args: argparse.Namespace) -> int:
    """Take the folder; 1 where figures were left out."""
    lease = check.read(args.folder)
    slug = lease.header["slug"]
    made = files(lease, args.results / slug)
    choices = table(lease, args.tuned / f"{slug}.json")
    found = figures(lease)
    log = args.log.read_text()
    lines = log_lines(lease, found, log)
    readme = args.readme.read_text()
    with_tables(readme, "")  # raises where there is no place for tables
    if not args.dry_run:
        for path, file in made.items():
            file.save(path)
        if choices is not None:
            args.tuned.mkdir(parents=True, exist_ok=True)
            report.write(args.tuned / f"{slug}.json", choices.encode())
        if lines:
            report.write(args.log, (log.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n").encode())
        status = report.main(["--results", str(args.results), "--readme", str(args.readme)])
        if status:
            return status
    for why in lease.rejected:
        print(f"left out: {why}")
    print(f"furthest from prediction, of {sum(f.ratio is not None for f in found)}:")
    for figure in furthest(found):
        print(f"  {figure}")
    rows = sum(len(file.rows) for file in made.values())
    print(
        f"{slug}: {len(lease.models)} model rows and {len(lease.kernels)} kernel rows "
        f"{'to take' if args.dry_run else 'taken'}, {rows} in all, {len(lines)} lines for LOG.md"
    )
    return int(bool(lease.rejected))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = __doc__.partition("\n\n")
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.take", description=summary, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("folder", type=Path, metavar="FOLDER", help="of benchmarks.lease")
    made.add_argument("--dry-run", action="store_true", help="write nothing")
    made.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    made.add_argument("--tuned", type=Path, default=ROOT / "kernels" / "tuned")
    made.add_argument("--readme", type=Path, default=ROOT / "README.md")
    made.add_argument("--log", type=Path, default=ROOT / "benchmarks" / "LOG.md")
    return made


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"benchmarks.take: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
