"""Fast pretraining distillation in little: Fashion-MNIST, a small convnet's answers in a store.

    python -m studies.store --data /usr/share/datasets/fashion-mnist --work runs/store

What a step costs from a store, with a live teacher and without one, and how good students become by
how many of the teacher's probabilities are kept. Each run is a `deit-fast` command, `--parallel` of
them at a time, and goes on where it stopped when this script is started again; the steps are timed
when all are done, one process at a time. The figures are written to docs/studies/store.json, and
from that file the page, store.md. `--quick` trains next to nothing; give it another `--docs`.
The data is Debian's package dataset-fashion-mnist, or any folder with the same idx files.
"""

import argparse
import concurrent.futures
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
from deit_fast.distill.store.read import settings_of
from deit_fast.distill.student import Settings
from deit_fast.distill.train import train
from studies.fashion_mnist import run, spread

HERE = Path(__file__).parent
RECIPE = "studies/fashion.json"
MODEL = {"patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 2}
MODEL_ARGS = [f"{name}={value}" for name, value in MODEL.items()] + ["weight_init=jax"]
TEACHER = [
    "--model", "resnet18", "--img-size", "28", "--mean", "0.286", "--std", "0.353",
    "--model-args", "in_chans=1", "channels=[32,64,128,256]", "layers=[2,2,1,1]",
    "--lr", "1e-3", "--warmup-epochs", "1",
]  # fmt: skip
LARGE = {"model_name": "resnet50", "in_chans": 1, "num_classes": 10}  # for time and memory alone
SOFT = ["--distill", "soft", "--soft-weight", "1", "--temperature", "1"]  # as a store with K = C
WAYS = {  # what steps are timed of
    "labels": "labels, no teacher", "store": "a store, K = 10",
    "teacher": "live teacher, the ResNet of this study", "large": "live teacher, ResNet-50",
}  # fmt: skip
FULL = {"count": 5000, "test": 10_000, "epochs": 5, "teacher_epochs": 10, "ks": [1, 2, 5, 10],
        "seeds": [0, 1], "batch": 64, "steps": 40, "repeats": 3}  # fmt: skip
QUICK = {"count": 512, "test": 200, "epochs": 1, "teacher_epochs": 1, "ks": [10],
         "seeds": [0], "batch": 32, "steps": 4, "repeats": 1}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "studies")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--time", choices=WAYS, help="time the steps of one way, and print them")
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    args.work = args.work.resolve()
    if args.time:
        print(json.dumps(measure(args.time, args.work, plan)))
        return
    prepare(args.data, args.work, plan)
    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        started = {}
        for name, command, needs in commands(args.work, plan):
            first = None if needs is None else started[needs]
            done = args.work / name if command[1] == "train" else None
            started[name] = pool.submit(run, command, done, first)
        try:
            for training in started.values():
                training.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    args.docs.mkdir(parents=True, exist_ok=True)
    study = collect(args, plan)
    (args.docs / "store.json").write_text(json.dumps(study, indent=1) + "\n")
    (args.docs / "store.md").write_text(page(study))
    print(page(study))


def prepare(data: Path, work: Path, plan: dict) -> None:
    """The first of the pictures, whose classes come in no order; and fewer for the clock, with next
    to nothing to evaluate on."""
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


def commands(work: Path, plan: dict):
    """(name, command, the name of the command it needs) of everything but the clock."""
    common = ["--recipe", RECIPE, "--workers", "0"]
    learn = [*common, "--eval-every", "100", "--batch", str(plan["batch"])]
    data = str(work / "data")
    epochs = ["--epochs", str(plan["epochs"])]
    teacher = ["--teacher", str(work / "teacher" / "model")]
    yield "teacher", [
        "deit-fast", "train", data, "--out", str(work / "teacher"), *learn, *TEACHER,
        "--epochs", str(plan["teacher_epochs"]),
    ], None  # fmt: skip
    ask = [*teacher, *common, "--img-size", "28"]
    for k in plan["ks"]:
        yield f"store-{k}", [
            "deit-fast", "distill-store", "write", data, str(work / f"store-{k}"), *ask, *epochs,
            "--k", str(k),
        ], "teacher"  # fmt: skip
    yield "timed", [
        "deit-fast", "distill-store", "write", str(work / "timed"), str(work / "timed-store"),
        *ask, "--epochs", "1", "--k", "10",
    ], "teacher"  # fmt: skip
    model = ["--model", "deit_tiny", "--model-args", *MODEL_ARGS]
    normal = ["--img-size", "28", "--mean", "0.286", "--std", "0.353"]
    for seed in plan["seeds"]:
        student = [*learn, *epochs, "--lr", "3e-3", "--seed", str(seed), *model]

        def out(name, seed=seed):
            return f"{name}-{seed}", ["--out", str(work / f"{name}-{seed}")]

        name, where = out("labels")
        yield name, ["deit-fast", "train", data, *where, *student, *normal], None
        name, where = out("live")
        yield name, [
            "deit-fast", "train", data, *where, *student, *normal, *teacher, *SOFT
        ], "teacher"  # fmt: skip
        for k in plan["ks"]:
            name, where = out(f"k{k}")
            yield name, [
                "deit-fast", "train", data, "--store", str(work / f"store-{k}"), *where, *student
            ], f"store-{k}"  # fmt: skip


class _Enough(Exception):
    pass


def measure(way: str, work: Path, plan: dict) -> dict:
    """Milliseconds of each step of training, decoding and augmentation included, of the one core's
    time and on the wall's clock; and the most resident memory, MiB, that this process had from the
    first of them on."""
    torch.set_num_threads(1)
    options = {"epochs": 1, "batch": plan["batch"], "warmup_epochs": 0, "lr": 3e-3}
    settings = {"data": str(work / "timed"), "model": "deit_tiny", "model_args": MODEL}
    if way == "store":
        settings["store"] = str(work / "timed-store")
        options |= settings_of(store.Store(settings["store"]))
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
        chosen = recipe.load(HERE / "fashion.json", **options)
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
    """Everything that the page says, as data."""
    found = {way: [] for way in WAYS}
    for _ in range(plan["repeats"]):  # in turn, for what else the machine does
        for way in WAYS:
            command = [sys.executable, "-m", "studies.store", "--time", way, "--data", "."]
            command += ["--work", str(args.work)] + ["--quick"] * args.quick
            ended = subprocess.run(
                command, cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True, text=True,
            )  # fmt: skip
            if ended.returncode:
                sys.exit(f"{shlex.join(command)}: {ended.returncode}\n{ended.stderr}")
            found[way].append(json.loads(ended.stdout.splitlines()[-1]))
    steps = {
        way: {
            "ms": [statistics.median(one["ms"]) for one in runs],
            "wall_ms": [statistics.median(one["wall_ms"]) for one in runs],
            "mib": [one["mib"] for one in runs],
        }
        for way, runs in found.items()
    }
    teacher = args.work / "teacher" / "model"
    rows = []
    names = ["labels", *(f"k{k}" for k in plan["ks"]), "live"]
    for name in names:
        results = [_json(args.work / f"{name}-{seed}" / "result.json") for seed in plan["seeds"]]
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
    facts, result = (_json(args.work / "teacher" / f"{name}.json") for name in ("run", "result"))
    parameters = {"teacher": facts["params"], "student": _json(args.work / "labels-0" / "run.json")}
    parameters["student"] = parameters["student"]["params"]
    large = timm.create_model(**LARGE)
    parameters["large"] = sum(p.numel() for p in large.parameters())
    return {
        "plan": plan, "parameters": parameters, "teacher_top1": result["top1"]["class"],
        "tested": result["images"], "steps": steps, "rows": rows,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "parallel": args.parallel},
        "versions": {
            "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _json(path):
    return json.loads(path.read_text())


def _kept(there):
    """The mean share of the probability that the K largest hold."""
    probs = [there.epoch(e).all()["probs"].astype(float) for e in range(there.manifest.epochs)]
    return statistics.mean(float(some.sum(1).mean()) for some in probs)


def _cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def page(study) -> str:
    """The study as Markdown, from its data alone."""
    plan, steps, parameters = study["plan"], study["steps"], study["parameters"]
    machine, versions = study["machine"], study["versions"]
    middle = {
        way: {of: statistics.median(values) for of, values in found.items()}
        for way, found in steps.items()
    }
    seeds = len(plan["seeds"])
    lines = [
        "# Training from a store of a teacher's answers, on Fashion-MNIST",
        "",
        "TinyViT's fast pretraining distillation in little, run as it stands here by `python -m "
        "studies.store`; this page is made from [store.json](store.json).",
        "",
        f"- Data: the first {plan['count']:,} pictures of Fashion-MNIST to train on, "
        f"{study['tested']:,} to test on, 28 x 28 grey pixels, 10 classes.",
        f"- Teacher: a ResNet of {parameters['teacher']:,} parameters, {plan['teacher_epochs']} "
        f"epochs on the same pictures, top-1 {study['teacher_top1']:.2f}%.",
        f"- Student: DeiT with patches of 4, width 64, 4 blocks, 2 heads: "
        f"{parameters['student']:,} parameters; {plan['epochs']} epochs, batch {plan['batch']}, "
        "lr 3e-3, else `studies/fashion.json`.",
        f"- {seeds} seed{'s' * (seeds > 1)} of the student, one store for all; the model of the "
        "last epoch. Nothing was chosen by these results.",
        f"- On a CPU alone ({machine['cpu']}, {machine['cores']} cores that had other work too), "
        "fp32, plain PyTorch: no Triton kernel ran, and no GPU has been asked.",
        "",
        "## What a step costs",
        "",
        f"Batch {plan['batch']}, one thread, one process at a time; the step with decoding, "
        f"augmentation, loss, backward and update: its time on a core, and by the wall's clock, "
        f"which other work on the machine disturbs. Median of {plan['repeats']} processes of "
        f"{plan['steps']} steps, lowest to highest; the most resident memory of the whole process "
        "in these steps, of which Python and PyTorch are the larger part.",
        "",
        "| learns from | teacher's parameters | core, ms a step | against the store | wall, ms a "
        "step | peak MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for way, label in WAYS.items():
        count = parameters.get(way, 0)
        core, wall = (
            f"{middle[way][of]:.1f} ({min(steps[way][of]):.1f} – {max(steps[way][of]):.1f})"
            for of in ("ms", "wall_ms")
        )
        cells = (
            label, f"{count:,}" if count else "–", core,
            f"{middle[way]['ms'] / middle['store']['ms']:.2f} x", wall,
            f"{middle[way]['mib']:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Accuracy against K",
        "",
        "| learns from | top-1, % | each seed | probability kept | bytes a record | store, bytes | "
        "check: mean difference | different indices |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in study["rows"]:
        each = ", ".join(f"{value:.2f}" for value in row["top1"])
        cells = [label_of(row["run"]), spread(row["top1"]), each]
        if "check" in row:
            cells += [
                f"{100 * row['kept']:.1f}%", str(row["record"]), f"{row['bytes']:,}",
                f"{row['check']['mean_difference']:.1e}",
                f"{100 * row['check']['different_indices']:.2f}%",
            ]  # fmt: skip
        else:
            cells += ["–"] * 5
        lines.append(f"| {' | '.join(cells)} |")
    same = all(row["bytes"] == row["predicted"] for row in study["rows"] if "check" in row)
    shown = Path("runs/store")
    lines += [
        "",
        f"{'Mean ± standard deviation over the seeds. ' if seeds > 1 else ''}The live teacher is "
        "heard by soft distillation of weight 1 at temperature 1, which is what a store with K = C "
        "teaches. `deit-fast distill-store check` asked the teacher again for as many records as "
        "an epoch has. The stores are "
        + ("exactly as large as was predicted." if same else "NOT as large as was predicted."),
        "",
        *findings(study),
        "",
        "## Again",
        "",
        "```bash",
        "apt install dataset-fashion-mnist && pip install -e '.[train]'",
        "python -m studies.store --data /usr/share/datasets/fashion-mnist --work runs/store "
        f"--parallel {machine['parallel']}",
        "```",
        "",
        "which runs, on a folder with so many of the pictures and with each K and seed:",
        "",
        "```bash",
        *shown_commands(shown),
        "```",
        "",
        f"torch {versions['torch']}, timm {versions['timm']}, Python {versions['python']}.",
    ]
    return "\n".join(lines) + "\n"


def label_of(name):
    names = {"labels": "labels, no teacher", "live": "live teacher"}
    return names.get(name) or f"store, K = {name[1:]}"


def findings(study):
    """What the tables say, in words that follow from their numbers."""
    middle = {way: statistics.median(found["ms"]) for way, found in study["steps"].items()}
    memory = {way: statistics.median(found["mib"]) for way, found in study["steps"].items()}
    said = []
    for way in ("teacher", "large"):
        less = 100 * (1 - middle["store"] / middle[way])
        said.append(
            f"- From the store a step takes {abs(less):.0f}% {'less' if less > 0 else 'MORE'} time "
            f"of a core and the process {abs(memory[way] - memory['store']):.0f} MiB "
            f"{'less' if memory['store'] < memory[way] else 'MORE'} than with the "
            f"{WAYS[way].partition(', ')[2].removeprefix('the ')} live."
        )
    top1 = {row["run"]: statistics.mean(row["top1"]) for row in study["rows"]}
    ks = [name for name in top1 if name.startswith("k")]
    best = max(ks, key=top1.get)
    apart = max(abs(top1[a] - top1[b]) for a in ks for b in ks)
    seeds = max(max(row["top1"]) - min(row["top1"]) for row in study["rows"])
    said.append(
        f"- Of the K tried, {best[1:]} has the highest mean; the largest difference between two K "
        f"is {apart:.2f} points, that of K = {ks[-1][1:]} to the live teacher "
        f"{top1[ks[-1]] - top1['live']:+.2f}, to labels {top1[ks[-1]] - top1['labels']:+.2f}. "
        f"Seeds alone differ by up to {seeds:.2f}."
    )
    return said


def shown_commands(work):
    """The commands with the largest K and the first seed, as one would type them."""
    k, seed = FULL["ks"][-1], FULL["seeds"][0]
    wanted = ("teacher", f"store-{k}", f"labels-{seed}", f"live-{seed}", f"k{k}-{seed}")
    for name, command, _ in commands(work, FULL):
        if name in wanted:
            yield shlex.join(command)


if __name__ == "__main__":
    main()
