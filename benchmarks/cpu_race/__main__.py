"""The command: python -m benchmarks.cpu_race. See the package's docstring."""

import argparse
import os
import signal
import sys
import time
from datetime import date
from pathlib import Path

import torch

from deit_fast.bench import device, results

from . import figures, machine, turns
from .contenders import BASELINE, CONTENDERS, NETWORKS, SMOKE

RESULTS = Path(__file__).parents[1] / "results"
# of a call of each network, in units of DeiT-Ti's, to share the time
COST = {"tiny": 1.0, "small": 3.7, "base": 14.0, "smoke": 1.0}
SWITCH = 8.0  # of the least that a turn takes, in the same units


def _names(known, what):
    def parse(text):
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names or len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(
                f"{what}: {text!r}, expected some of {', '.join(known)}, each once"
            )
        return names

    return parse


def _batches(text):
    try:
        batches = [int(number) for number in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers from 1, such as 1,8")
    return batches


def parser() -> argparse.ArgumentParser:
    """Of the command's options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_race",
        description="DeiT on this CPU, in fp32: timm, torch.compile, ONNX Runtime, OpenVINO, ours.",
    )
    networks = _names((*NETWORKS, "smoke"), "models")
    made.add_argument("--models", type=networks, default=list(NETWORKS), metavar="NAMES",
                      help="default: tiny,small,base")  # fmt: skip
    made.add_argument("--batches", type=_batches, default=[1, 8], metavar="NUMBERS",
                      help="default: 1,8")  # fmt: skip
    made.add_argument("--contenders", type=_names(CONTENDERS, "contenders"), metavar="NAMES",
                      default=list(CONTENDERS),
                      help=f"of {', '.join(CONTENDERS)}; default: all")  # fmt: skip
    made.add_argument("--rounds", type=int, default=12, help="at most (default: %(default)s)")
    made.add_argument("--turn", type=float, default=0.15, metavar="SECONDS",
                      help="of calls in a turn, one at least (default: %(default)s)")  # fmt: skip
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)),
                      help="of each contender (default: the cores, %(default)s)")  # fmt: skip
    made.add_argument("--minutes", type=float, default=10.0,
                      help="for the rounds, without building (default: %(default)s)")  # fmt: skip
    made.add_argument("--out", type=Path, help="default: benchmarks/results/cpu-<model>/race.json")
    return made


def _checked(args, parse):
    if args.rounds < 2:
        parse.error(f"--rounds {args.rounds}: expected 2 or more")
    if not 0 < args.threads <= (cores := len(os.sched_getaffinity(0))):
        parse.error(f"--threads {args.threads}: expected 1 to {cores}, the cores there are")
    for name in ("turn", "minutes"):
        if not getattr(args, name) > 0:
            parse.error(f"--{name} {getattr(args, name)}: expected more than 0")
    if BASELINE not in args.contenders:
        args.contenders.insert(0, BASELINE)  # everything is compared with it
    args.contenders.sort(key=list(CONTENDERS).index)
    cpu = torch.device("cpu")
    args.out = args.out or RESULTS / device.slug(cpu) / "race.json"
    facts = machine.facts()
    if args.out.exists():
        try:
            held = figures.load(args.out)["machine"]
        except figures.CorruptRace as error:
            parse.error(str(error))
        if held != facts:
            parse.error(f"--out {args.out}: holds figures of {held}, this is {facts}")
    return facts


def _print(cell, load):
    print(f"{cell['network']}, batch {cell['batch']}, {cell['rounds']} rounds, load average "
          f"{load.load_average:.2f}, others {load.other_percent:.1f}% of the CPU time, "
          f"steal {load.steal_percent:.1f}%")  # fmt: skip
    for row in cell["rows"]:
        name = f"  {CONTENDERS[row['contender']][0]:36}"
        if row["status"] != "measured":
            print(f"{name} {row['status']}: {row['note']}")
            continue
        print(f"{name} {row['ms_median']:8.2f} ms ({row['ms_p20']:.2f} to {row['ms_p80']:.2f}), "
              f"{row['ratio_median']:.3f} times eager ({row['ratio_p20']:.3f} to "
              f"{row['ratio_p80']:.3f})")  # fmt: skip
    if load.warning:
        print(f"  WARNING: {load.warning}: do not trust these figures", file=sys.stderr)
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Run; 2 where an argument is wrong, 1 where the baseline does not run."""
    parse = parser()
    # ends the workers too, which may be stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parse.parse_args(argv)
    facts = _checked(args, parse)
    stamp = {
        "date": date.today().isoformat(), "commit": results.commit(),
        "build": results.build(device.hardware(torch.device("cpu"))),
        "versions": machine.versions(),
    }  # fmt: skip
    cells = [(model, batch) for model in args.models for batch in args.batches]
    left, begun = 60 * args.minutes, time.monotonic()
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}, {args.threads} threads each; "
          f"load average {os.getloadavg()[0]:.2f}; {args.out}", flush=True)  # fmt: skip
    for i, (model, batch) in enumerate(cells):
        shares = [COST[m] * b + SWITCH for m, b in cells[i:]]
        network, timm_name = SMOKE if model == "smoke" else NETWORKS[model]
        start = time.monotonic()
        try:
            outcome = turns.run(
                args.contenders, timm_name, batch, args.threads, args.rounds, args.turn,
                left * shares[0] / sum(shares),
            )  # fmt: skip
        except RuntimeError as error:
            print(f"cpu_race: {error}", file=sys.stderr)
            return 1
        left -= outcome.seconds
        load = outcome.load
        cell = {
            "network": network, "timm_name": timm_name, "batch": batch, "threads": args.threads,
            "rounds": outcome.rounds, "turn_s": args.turn, **stamp,
            "load_average": load.load_average, "other_percent": load.other_percent,
            "steal_percent": load.steal_percent, "rows": outcome.rows,
        }  # fmt: skip
        figures.put(args.out, facts, cell)
        _print(cell, load)
        print(f"  {time.monotonic() - start:.0f} s, of which {outcome.seconds:.0f} s of rounds")
    print(f"{time.monotonic() - begun:.0f} s in all; the tables: python -m benchmarks.report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
