"""images/s of one model on this machine: eager PyTorch, torch.compile, deit_fast.

Examples:
  deit-fast bench deit_small_distilled
  deit-fast bench deit_base_384 --batches 1,8,256 --modes eager_bf16,deit_fast_bf16
  deit-fast bench deit_tiny --protocol latency --batches 1 --json tiny.json
  deit-fast bench vit_base_patch16_224 --image-size 384 --profile traces
  deit-fast bench deit_small_distilled --protocol step --batches 64,256

Weights are random: speed does not depend on them. Each mode's outputs are checked against eager
fp32 before it is timed. Ctrl-C keeps what was measured. An existing --json file gains or renews
rows.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deit_fast.bench import profiling, results, tables
from deit_fast.bench.device import device_name, hardware
from deit_fast.bench.measure import PROTOCOLS, Plan, measure
from deit_fast.bench.modes import MODES, pick
from deit_fast.bench.network import Network
from deit_fast.bench.peak_rates import of_rows, peak_rates

DEFAULT_MODES = {
    "cuda": "eager_fp32,eager_bf16,compile_max_autotune_bf16,deit_fast_fp32,deit_fast_bf16",
    "cpu": "eager_fp32,deit_fast_fp32",
}
TRAIN_MODES = {
    "cuda": "eager_amp_bf16_train,compile_max_autotune_amp_bf16_train,deit_fast_amp_bf16_train,"
    "deit_fast_reduce_overhead_amp_bf16_train",
    "cpu": "eager_fp32_train,deit_fast_fp32_train",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("model", metavar="MODEL", help="one of ours or any timm name")
    parser.add_argument("--image-size", type=int, metavar="PX", help="(default: the model's own)")
    parser.add_argument(
        "--modes", metavar="NAMES", help=f"of {', '.join(MODES)} (default: a few of them)"
    )
    parser.add_argument("--batches", metavar="NUMBERS", help="(default: 256; 8 on a CPU)")
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="batch",
        help="batch: median at that batch; paper: the largest that fits up to it, mean; latency: "
        "each call waited for; host: as batch, from pinned host memory; step: as batch, training "
        "with AdamW (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=10, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write or extend a results file")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR",
        help="also save a trace of each mode and show where one call spends its time",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure and print; writes a results file and traces if asked to.

    Returns:
        0; 1 where a row failed; 130 after Ctrl-C.

    Raises:
        ValueError: An option, the results file or the network is wrong.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = _numbers(args.batches or ("256" if device.type == "cuda" else "8"))
    default = TRAIN_MODES if args.protocol == "step" else DEFAULT_MODES
    names = (args.modes or default[device.type]).split(",")
    modes = [MODES[name] for name in pick("--modes", names, MODES)]
    for mode in modes:
        if args.protocol == "step" and not mode.train:
            raise ValueError(
                f"--modes: {mode.name} by protocol step, expected one that ends in _train"
            )
    for name in ("runs", "warmup"):
        if getattr(args, name) < (name == "runs"):
            raise ValueError(
                f"--{name}: {getattr(args, name)}, expected {int(name == 'runs')} or more"
            )
    machine = hardware(device)
    timer = "cuda events" if device.type == "cuda" else "perf_counter"
    protocol = {"runs": args.runs, "warmup": args.warmup, "timer": timer}
    # a corrupt file is refused before anything is measured
    results.open_results(args.json, machine, protocol, {})
    network = Network(args.model, args.image_size, device)
    missing = {mode: network.why_not(mode) for mode in modes if network.why_not(mode)}
    if missing and args.modes:
        mode, reason = next(iter(missing.items()))
        raise ValueError(f"--modes: {mode.name} for {network.timm_name}: {reason}")
    modes = [mode for mode in modes if mode not in missing]

    console, notes = tables.console(), Console(stderr=True)
    todo = [(mode, batch) for batch in batches for mode in modes]
    rows: list[results.ModelRow] = []
    profiles: list[tuple[str, dict[str, float], Path]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    interrupted = False
    try:
        with Progress(*columns, TimeElapsedColumn(), console=notes, transient=True) as progress:
            task = progress.add_task("peak rates of the chip", total=len(todo))
            rates = peak_rates(device, args.runs)
            file = results.open_results(args.json, machine, protocol, rates)
            stamp = {"commit": results.commit(), "build": results.build(machine)}
            for mode, batch in todo:
                progress.update(task, description=f"{mode.name}, batch {batch}")
                plan = Plan(args.protocol, batch, args.runs, args.warmup)
                rows.append(measure(network, mode, plan, of_rows(rates, device), stamp)[0])
                if args.json:
                    file.put(rows[-1])
                    file.save(args.json)
                if args.profile and rows[-1].status == "measured":
                    profiles.append(profiling.profile_row(network, rows[-1], args.profile))
                progress.advance(task)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if rows:
            console.print(tables.models(rows))
        for title, milliseconds, trace in profiles:
            console.print(tables.shares(title, milliseconds))
            console.print(f"trace: {trace}", soft_wrap=True)
    console.print(
        f"device: {device_name(device)}, {args.runs} calls after {args.warmup}", soft_wrap=True
    )
    if device.type == "cpu":
        console.print("These figures are a CPU's: deit_fast runs plain PyTorch there.")
    if args.json and rows:
        console.print(f"results: {args.json}", soft_wrap=True)
    if interrupted:
        rest = ", ".join(f"{mode.name} at {batch}" for mode, batch in todo[len(rows) :])
        notes.print(f"interrupted; not measured: {rest}", soft_wrap=True)
        return 130
    return 1 if any(row.status == "failed" for row in rows) else 0


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"--batches: {text!r}, expected numbers from 1 such as 1,8,256")
    return numbers
