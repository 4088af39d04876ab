"""Fast pretraining distillation on Fashion-MNIST: a small convnet's soft labels in a store.

    python -m studies.store --data /usr/share/datasets/fashion-mnist --work runs/store

What a step costs from a soft-label store, with a live teacher and without one, and how good
students become by how many of the teacher's probabilities are stored. Each run is a `deit-fast`
command, `--parallel` of them at a time, and goes on where it stopped when this script is started
again; the steps are timed when all are done, one process at a time. The figures are written to
docs/studies/store.json, and from that file the page, store.md. `--quick` is a smoke run; give it
another `--docs`. The data is Debian's package dataset-fashion-mnist, or any folder with the same
idx files.
"""

import gzip
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import timm
import torch

import deit_fast
from deit_fast.distill import recipe, store
from deit_fast.distill.store.compatibility import recipe_settings
from deit_fast.distill.student import Settings
from deit_fast.distill.train import train
from studies import runs
from studies.runs import read_json
from studies.store_page import WAYS, page
from studies.store_plan import FULL, QUICK, commands

LARGE = {"model_name": "resnet50", "in_chans": 1, "num_classes": 10}  # for time and memory alone


def main():
    parser = runs.parser_of(__doc__, runs.ROOT / "docs" / "studies")
    runs.add_runs(parser)
    parser.add_argument("--time", choices=WAYS, help="time the steps of one way, and print them")
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    args.work = args.work.resolve()
    if args.time:
        print(json.dumps(measure(args.time, args.work, plan)))
        return
    prepare(args.data, args.work, plan)
    runs.run_all(commands(args.work, plan), args.work, args.parallel)
    runs.write_study(args.docs, "store", collect(args, plan), page)


def prepare(data: Path, work: Path, plan: dict) -> None:
    """Write the first images, whose classes come in no order; and fewer of them for the clock, with
    next to nothing to evaluate on."""
    parts = {"data": (plan["count"], plan["test"]), "timed": (plan["steps"] * plan["batch"], 100)}
    for folder, counts in parts.items():
        (work / folder).mkdir(parents=True, exist_ok=True)
        for split, count in zip(("train", "t10k"), counts, strict=True):
            for kind, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
                content = gzip.decompress((data / f"{split}-{kind}-ubyte.gz").read_bytes())
                some = content[:4] + count.to_bytes(4, "big") + content[8 : header + count * size]
                (work / folder / f"{split}-{kind}-ubyte").write_bytes(some)
    if not (work / "large").exists():
        torch.manual_seed(0)
        large = timm.create_model(**LARGE)
        large.pretrained_cfg = dict(large.pretrained_cfg) | {"mean": (0.286,), "std": (0.353,)}
        deit_fast.save_pretrained(large, work / "large")


class _Enough(Exception):
    pass


def measure(way: str, work: Path, plan: dict) -> dict:
    """Milliseconds of each step of training, decoding and augmentation included, of the one core's
    time and on the wall's clock; and the most resident memory, MiB, that this process had from the
    first of them on."""
    torch.set_num_threads(1)
    options = {"epochs": 1, "batch": plan["batch"], "warmup_epochs": 0, "lr": 3e-3}
    settings = {"data": str(work / "timed"), "model": "deit_tiny", "model_args": runs.DEIT}
    if way == "store":
        settings["store"] = str(work / "timed-store")
        options |= recipe_settings(store.Store(settings["store"]))
    else:
        settings |= {"img_size": 28, "mean": (0.286,), "std": (0.353,)}
    if way in ("teacher", "large"):
        model = work / "teacher" / "model" if way == "teacher" else work / "large"
        settings |= {"distill": "soft", "teacher": str(model)}
        options |= {"soft_weight": 1.0, "temperature": 1.0}
    clock = []

    def report(event):
        if event["event"] != "update":
            return
        if not clock:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of importing is nobody's
        clock.append((time.process_time(), time.perf_counter()))
        if event["update"] == plan["steps"]:
            raise _Enough

    try:
        chosen = recipe.load(runs.ROOT / runs.RECIPE, **options)
        train(Settings(**settings), chosen, work / "clock", restart=True, report=report)
    except _Enough:
        pass
    core, wall = (
        [1e3 * (b[i] - a[i]) for a, b in pairwise(clock)]  # but the first
        for i in (0, 1)
    )
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"ms": core, "wall_ms": wall, "mib": int(peak[1]) / 1024}


def collect(args, plan) -> dict:
    """Everything on the page, as data."""
    found = {way: [] for way in WAYS}
    for _ in range(plan["repeats"]):  # in turn, for what else the machine does
        for way in WAYS:
            command = [sys.executable, "-m", "studies.store", "--time", way, "--data", "."]
            command += ["--work", str(args.work)] + ["--quick"] * args.quick
            ended = subprocess.run(
                command, cwd=runs.ROOT, env=runs.one_thread(),
                capture_output=True, text=True,
            )  # fmt: skip
            if ended.returncode:
                sys.exit(f"{shlex.join(command)}: {ended.returncode}\n{ended.stderr}")
            found[way].append(json.loads(ended.stdout.splitlines()[-1]))
    steps = {
        way: {
            "ms": [statistics.median(one["ms"]) for one in measured],
            "wall_ms": [statistics.median(one["wall_ms"]) for one in measured],
            "mib": [one["mib"] for one in measured],
        }
        for way, measured in found.items()
    }
    teacher = args.work / "teacher" / "model"
    rows = []
    names = ["labels", *(f"k{k}" for k in plan["ks"]), "live"]
    for name in names:
        results = [
            read_json(args.work / f"{name}-{seed}" / "result.json") for seed in plan["seeds"]
        ]
        row = {"run": name, "top1": [result["top1"]["class"] for result in results]}
        row["seconds"] = [round(result["seconds"]) for result in results]
        if name.startswith("k"):
            there = store.Store(args.work / f"store-{name[1:]}")
            asked = store.check(args.work / "data", there.folder, teacher, samples=plan["count"])
            row |= {
                "record": there.manifest.record.itemsize,
                "bytes": sum(path.stat().st_size for path in there.folder.glob("*.records")),
                "predicted": there.manifest.epochs * there.manifest.epoch_bytes,
                "kept": _kept(there), "check": asked,
            }  # fmt: skip
        rows.append(row)
    facts, result = (
        read_json(args.work / "teacher" / f"{name}.json") for name in ("run", "result")
    )
    parameters = {
        "teacher": facts["params"],
        "student": read_json(args.work / "labels-0" / "run.json"),
    }
    parameters["student"] = parameters["student"]["params"]
    large = timm.create_model(**LARGE)
    parameters["large"] = sum(p.numel() for p in large.parameters())
    return {
        "plan": plan, "parameters": parameters, "teacher_top1": result["top1"]["class"],
        "tested": result["images"], "steps": steps, "rows": rows,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "parallel": args.parallel},
        "versions": runs.versions(),
    }  # fmt: skip


def _kept(there):
    """The mean share of the probability that the K largest hold."""
    probs = [there.epoch(e).all()["probs"].astype(float) for e in range(there.manifest.epochs)]
    return statistics.mean(float(some.sum(1).mean()) for some in probs)


def _cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


if __name__ == "__main__":
    main()
