"""What `deit-fast bench` does; its options are in parsers/bench.py."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deit_fast.bench import profiling, results, tables
from deit_fast.bench.device import device_name, hardware
from deit_fast.bench.measure import Plan, measure
from deit_fast.bench.modes import MODES, pick
from deit_fast.bench.network import Network
from deit_fast.bench.peak_rates import of_rows, peak_rates

from . import _json
from .parsers._options import STDOUT

DEFAULT_MODES = {
    "cuda": "eager_fp32,eager_bf16,compile_max_autotune_bf16,deit_fast_fp32,deit_fast_bf16",
    "cpu": "eager_fp32,deit_fast_fp32",
}
TRAIN_MODES = {
    "cuda": "eager_amp_bf16_train,compile_max_autotune_amp_bf16_train,deit_fast_amp_bf16_train,"
    "deit_fast_reduce_overhead_amp_bf16_train",
    "cpu": "eager_fp32_train,deit_fast_fp32_train",
}


def run(args: argparse.Namespace) -> int:
    """Measure and print; writes a results file and traces if asked to.

    Returns:
        0; 1 where a row failed; 130 after Ctrl-C.

    Raises:
        ValueError: An option, the results file or the network is wrong.
    """
    if args.modes == "list":
        print("\n".join(MODES))
        return 0
    with _json.output(args.json if args.json == STDOUT else None) as write:
        return _run(args, None if args.json == STDOUT else args.json, write)


def _run(args: argparse.Namespace, path: Path | None, write: Callable[[Any], None]) -> int:
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
    file = results.open_results(path, machine, protocol, {})
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
            file = results.open_results(path, machine, protocol, rates)
            stamp = {"commit": results.commit(), "build": results.build(machine)}
            for mode, batch in todo:
                progress.update(task, description=f"{mode.name}, batch {batch}")
                plan = Plan(args.protocol, batch, args.runs, args.warmup)
                rows.append(measure(network, mode, plan, of_rows(rates, device), stamp)[0])
                file.put(rows[-1])
                if path:
                    file.save(path)
                if args.profile and rows[-1].status == "measured":
                    profiles.append(profiling.profile_row(network, rows[-1], args.profile))
                progress.advance(task)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        write(file.document())
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
    if path and rows:
        console.print(f"results: {path}", soft_wrap=True)
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
