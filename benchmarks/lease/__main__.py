"""The most valuable measurements of a GPU that is lent for fifteen minutes, in nine, in order.

examples:
  python -m benchmarks.lease --out FOLDER
  python -m benchmarks.lease --out FOLDER --resume EARLIER       what is missing there
  python -m benchmarks.lease --out FOLDER --steps smoke tune     these alone
  python -m benchmarks.lease --list

Needs torch, Triton and timm, nothing else, and no installation. Every step is a process of its own
with a time budget and a time at which it is killed; every row is on disk the moment it exists.
Without a GPU all of it runs with small shapes, as a rehearsal. Exit status: 0, or 1 where a step
failed, or 2 where nothing could be measured.
"""

import argparse
import sys
from pathlib import Path

from .plan import NAMES, SECONDS, STEPS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = __doc__.partition("\n\n")
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.lease", description=summary, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--out", type=Path, metavar="FOLDER", help="for the results: new or empty")
    made.add_argument("--resume", type=Path, metavar="FOLDER", help="results to go on from")
    made.add_argument("--steps", nargs="+", metavar="STEP", help=f"of: {' '.join(NAMES)}")
    made.add_argument(
        "--seconds", type=float, default=SECONDS, help="of the whole run (default: %(default)g)"
    )
    made.add_argument(
        "--processes", type=int, metavar="N", help="that compile in the background (default: cores)"
    )
    made.add_argument("--list", action="store_true", help="print the steps and their budgets")
    return made


def check(args: argparse.Namespace) -> None:
    """Check the options, before anything is imported or written.

    Raises:
        ValueError: They make no run; the message names the option.
    """
    unknown = [name for name in args.steps or [] if name not in NAMES]
    if unknown:
        raise ValueError(
            f"--steps: unknown {' '.join(unknown)}, expected some of {' '.join(NAMES)}"
        )
    if not args.seconds > 0:
        raise ValueError(f"--seconds: {args.seconds:g}, expected more than 0")
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes: {args.processes}, expected 1 or more")
    if args.out is None and args.resume is None:
        raise ValueError("--out: not given, expected a new or empty folder")
    args.out = args.out or args.resume
    same = args.resume is not None and args.out.resolve() == args.resume.resolve()
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: {args.out} is no folder")
    if args.out.exists() and any(args.out.iterdir()) and not same:
        raise ValueError(f"--out: {args.out} is not empty; --resume {args.out} goes on from it")
    if args.resume is not None and not (args.resume / "lease.json").is_file():
        raise ValueError(f"--resume: no lease.json in {args.resume}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(argv)
    if args.list:
        for step in STEPS:
            print(f"{step.name:14} {step.seconds:4.0f} s  {step.title}")
        return 0
    try:
        check(args)
        from .orchestrate import run  # takes seconds: torch, timm, Triton

        return run(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"benchmarks.lease: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
