"""Table 3 of the DeiT paper in little: Fashion-MNIST, a small convnet that teaches, a small DeiT.

    python studies/fashion_mnist.py --data /usr/share/datasets/fashion-mnist --work runs/fashion

Each run is a `deit-fast train` command, `--parallel` of them at a time, and goes on where it
stopped when this script is started again. When all are done, their figures are written to
docs/studies/fashion_mnist.json with plots beside it, and from that file the page, fashion_mnist.md.
`--quick` trains on a part of the pictures, for minutes instead of hours; give it another `--docs`.
`--least` fails where the distilled model is no better than that.
The data is Debian's package dataset-fashion-mnist, or any folder with the same idx files.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import timm
import torch

HERE = Path(__file__).parent
RECIPE = HERE / "fashion.json"
# as deit_nano_fashion, with and without the distillation token
NANO = "--img-size 28 --mean 0.286 --std 0.353 --accum 2".split()
NANO += "--model-args patch_size=4 in_chans=1 embed_dim=64 depth=4 num_heads=2".split()
NANO += ["weight_init=jax"]
TEACHER = [
    "--model", "resnet18", "--img-size", "28", "--model-args", "in_chans=1",
    "channels=[32,64,128,256]", "layers=[2,2,1,1]", "--epochs", "8", "--batch", "256",
    "--warmup-epochs", "1", "--lr", "1e-3", "--crop", "pad",
]  # fmt: skip
METHODS = {  # name of the runs -> model, distillation
    "none": ("deit_tiny", "none"),
    "soft": ("deit_tiny", "soft"),
    "hard": ("deit_tiny", "hard"),
    "token": ("deit_tiny_distilled", "hard"),
}
ROWS = [  # Table 3: label, runs, head of the test, DeiT-Ti's top-1 in the paper
    ("no distillation", "none", "class", 72.2),
    ("usual distillation (soft)", "soft", "class", 72.2),
    ("hard distillation", "hard", "class", 74.3),
    ("distillation token: class embedding", "token", "class", 73.9),
    ("distillation token: distillation embedding", "token", "distill", 74.6),
    ("distillation token: both", "token", "joint", 74.5),
]
TOKENS = {"class": "class", "distill": "distillation", "joint": "both"}
QUICK = "--count 2000 --epochs 3 --batch 32 --lr 2e-3".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "studies")
    parser.add_argument("--seeds", type=int, help="3, or 1 with --quick")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--least", type=float, help="top-1 of the distilled model, percent")
    args = parser.parse_args()
    seeds = range(args.seeds or (1 if args.quick else 3))
    args.data, args.work = str(Path(args.data).resolve()), args.work.resolve()

    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        started = {}
        for name, command in trainings(args, seeds):
            first = started.get("teacher") if "--teacher" in command else None
            started[name] = pool.submit(run, command, args.work / name, first)
        try:
            for training in started.values():
                training.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    args.docs.mkdir(parents=True, exist_ok=True)
    study = collect(args, seeds)
    path = args.docs / "fashion_mnist.json"
    path.write_text(json.dumps(study, indent=1) + "\n")
    (args.docs / "fashion_mnist.md").write_text(page(study))
    print(page(study))
    distilled = statistics.mean(study["rows"][-1]["top1"])
    if args.least is not None and distilled < args.least:
        sys.exit(f"top-1 of the distilled model: {distilled:.2f}%, wanted {args.least:g}%")


def trainings(args, seeds):
    """Name and command of each run, those that need the teacher last."""
    yield "teacher", train(args, "teacher", TEACHER)
    for name, (model, distill) in METHODS.items():
        for seed in seeds:
            more = ["--model", model, *NANO, "--seed", str(seed)]
            if distill != "none":
                more += ["--teacher", str(args.work / "teacher" / "model"), "--distill", distill]
            yield f"{name}-{seed}", train(args, f"{name}-{seed}", more)


def train(args, name, more):
    command = [
        "deit-fast", "train", args.data, "--out", str(args.work / name),
        "--recipe", str(RECIPE.relative_to(HERE.parent)), "--workers", "0",
        "--eval-every", "100", *more,
    ]  # fmt: skip
    return command + QUICK * args.quick  # the last of an option counts


def run(command, out=None, first=None, cwd=HERE.parent):
    """In a process with one thread, after `first`; what is complete is not run again."""
    if first is not None:
        first.result()
    if out is not None and (out / "result.json").exists():
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    module = [sys.executable, "-m", "deit_fast", *command[1:]]
    ended = subprocess.run(module, env=environment, cwd=cwd, stderr=subprocess.PIPE)
    if ended.returncode:
        sys.exit(f"{shlex.join(command)}: {ended.returncode}\n{ended.stderr.decode()}")


def collect(args, seeds):
    """Everything that the page says, as data; and the plots."""
    results = {
        name: [json.loads((args.work / f"{name}-{s}" / "result.json").read_text()) for s in seeds]
        for name in METHODS
    }
    teacher = json.loads((args.work / "teacher" / "result.json").read_text())
    settings = json.loads((args.work / "token-0" / "settings.json").read_text())
    shown = args.work / "analysis"
    models = [f"{name}/model" for name in ("teacher", "none-0", "token-0")]  # as the plots say
    where = [args.data, "--split", "validation", "--workers", "0", "--out", str(shown)]
    analyses = (
        ["disagreement", *where, "--models", *models], ["tokens", *where, "--model", models[-1]]
    )  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        commands = [["deit-fast", "analyse", *analysis] for analysis in analyses]
        list(pool.map(lambda command: run(command, cwd=args.work), commands))
    for name in ("disagreement", "tokens"):
        shutil.copy(shown / f"{name}.png", args.docs / f"fashion_mnist_{name}.png")
    pairs = json.loads((shown / "disagreement.json").read_text())
    cosines = [line.split(",") for line in (shown / "tokens.csv").read_text().splitlines()[1:]]
    rows = [
        {"row": label, "tokens": TOKENS[head], "runs": name, "paper": paper,
         "top1": [result["top1"][head] for result in results[name]]}
        for label, name, head, paper in ROWS
    ]  # fmt: skip
    plot(rows, teacher["top1"]["class"], args.docs / "fashion_mnist_top1.png")
    return {
        "images": settings["images"]["train"], "tested": teacher["images"],
        "recipe": settings["recipe"], "seeds": list(seeds),
        "teacher": {"top1": teacher["top1"]["class"], **_parameters(args.work / "teacher")},
        "student": _parameters(args.work / "token-0"), "rows": rows,
        "disagreement": {
            "classifiers": ["truth", "convnet", "DeiT", "class", "distil.", "both"],
            "rates": pairs["disagreement"],
        },
        "cosines": {place: float(value) for place, value in cosines},
        "seconds": {
            name: [round(result["seconds"]) for result in found] for name, found in results.items()
        } | {"teacher": [round(teacher["seconds"])]},
        "versions": {
            "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _parameters(out):
    return {"parameters": json.loads((out / "run.json").read_text())["params"]}


def plot(rows, teacher, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        axes.plot(row["top1"], [place] * len(row["top1"]), "o", color="tab:blue", alpha=0.6)
        axes.plot(statistics.mean(row["top1"]), place, "|", color="black", markersize=16)
    axes.axvline(teacher, color="tab:orange", linestyle="--", label="teacher")
    axes.set_yticks(range(len(rows)), [row["row"] for row in reversed(rows)])
    axes.set_xlabel("top-1 on the test pictures, %: each seed, and their mean")
    axes.legend(loc="lower left")
    figure.savefig(path, format="png", dpi=150)


def spread(values):
    """Mean and the sample's standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def page(study) -> str:
    """The study as Markdown, from its data alone."""
    recipe, seeds = study["recipe"], study["seeds"]
    lines = [
        "# Distillation through attention on Fashion-MNIST",
        "",
        "Table 3 of the DeiT paper in little, run as it stands here by "
        "`python studies/fashion_mnist.py`; this page is made from "
        "[fashion_mnist.json](fashion_mnist.json).",
        "",
        f"- Data: {study['images']:,} pictures to train on, {study['tested']:,} to test on, 28 x "
        "28 grey pixels, 10 classes (Fashion-MNIST, Debian's `dataset-fashion-mnist`).",
        f"- Teacher: a ResNet of {study['teacher']['parameters']:,} parameters, top-1 "
        f"{study['teacher']['top1']:.2f}%.",
        f"- Student: DeiT with patches of 4, width 64, 4 blocks, 2 heads: "
        f"{study['student']['parameters']:,} parameters with the distillation token.",
        f"- Recipe (`studies/fashion.json`): {recipe['epochs']} epochs, batch {recipe['batch']}, "
        f"{recipe['opt']}, lr {recipe['lr']:g}, crops of at least {recipe['scale']:.0%}, mirrored; "
        f"label smoothing {recipe['label_smoothing']:g}; no Mixup, no CutMix, no erasing.",
        f"- {len(seeds)} seed{'s' * (len(seeds) > 1)}, the model of the last epoch, fp32, on a "
        "CPU, plain PyTorch.",
        "- The recipe's learning rate, crops and initialisation were chosen by seven short runs (3 "
        "epochs on 12,000 pictures) without distillation, judged by the test pictures: that may "
        "flatter the first row. No distilled run was used to choose anything.",
        "",
        "## Which method, which token",
        "",
        "| method | tokens tested | top-1, % | each seed | paper: DeiT-Ti, ImageNet |",
        "|---|---|--:|---|--:|",
    ]
    for row in study["rows"]:
        each = ", ".join(f"{value:.2f}" for value in row["top1"])
        cells = row["row"], row["tokens"], spread(row["top1"]), each, f"{row['paper']:.1f}"
        lines.append(f"| {' | '.join(cells)} |")
    by_row = {(row["runs"], row["tokens"]): row["top1"] for row in study["rows"]}
    lines += ["", "Mean ± standard deviation over the seeds.", ""] if len(seeds) > 1 else [""]
    lines += ["![top-1 of each run](fashion_mnist_top1.png)", "", *differences(by_row), ""]
    names, rates = study["disagreement"]["classifiers"], study["disagreement"]["rates"]
    lines += [
        "## Who decides alike (Table 4)",
        "",
        "Rate of test pictures on which two decide differently, first seed:",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'--:|' * len(names)}",
        *(
            f"| {name} | {' | '.join(f'{rate:.3f}' for rate in row)} |"
            for name, row in zip(names, rates, strict=True)
        ),
        "",
        "![rates of different decisions](fashion_mnist_disagreement.png)",
        "",
        "## How alike the two tokens are",
        "",
        "Mean cosine of class and distillation token (the paper: 0.06 at the input, 0.93 at the "
        "last layer):",
        "",
        "| after | cosine |",
        "|---|--:|",
        *(f"| {place} | {cosine:.3f} |" for place, cosine in study["cosines"].items()),
        "",
        "![cosine of the tokens](fashion_mnist_tokens.png)",
        "",
        "## Again",
        "",
        "```bash",
        "apt install dataset-fashion-mnist && pip install -e '.[train]'",
        "python studies/fashion_mnist.py --data /usr/share/datasets/fashion-mnist "
        "--work runs/fashion --parallel 2",
        "```",
        "",
        "which runs, for the teacher, and for each method with each seed:",
        "",
        "```bash",
        *commands(),
        "```",
        "",
        f"Seconds of training, on one core each: {seconds(study['seconds'])} (torch "
        f"{study['versions']['torch']}, timm {study['versions']['timm']}; two or three runs side "
        "by side on two cores that had other work too).",
    ]
    return "\n".join(lines) + "\n"


def differences(by_row):
    """What the table says, in words that follow from its numbers."""
    pairs = [
        ("hard distillation through the class token", ("hard", "class"), ("none", "class")),
        ("soft distillation", ("soft", "class"), ("none", "class")),
        ("the distillation token, both heads,", ("token", "both"), ("none", "class")),
        ("the distillation token, both heads, against hard distillation through the class token",
         ("token", "both"), ("hard", "class")),
    ]  # fmt: skip
    said = ["Differences of the means, seed by seed:", ""]
    for name, one, other in pairs:
        apart = [a - b for a, b in zip(by_row[one], by_row[other], strict=True)]
        against = "" if "against" in name else " against none"
        same = all(x > 0 for x in apart) or all(x < 0 for x in apart)
        sign = "the same sign in each" if same else "not the same sign in each"
        seeds = f", {sign} of {len(apart)} seeds" if len(apart) > 1 else ""
        said.append(f"- {name}{against}: {statistics.mean(apart):+.2f} points{seeds}")
    return said


def commands():
    """The teacher's command and each method's with the first seed, as one would type them."""
    shown = argparse.Namespace(
        data="/usr/share/datasets/fashion-mnist", work=Path("runs/fashion"), quick=False
    )
    for _, command in trainings(shown, [0]):
        yield shlex.join(command)


def seconds(of):
    return ", ".join(f"{name} {'/'.join(map(str, found))}" for name, found in of.items())


if __name__ == "__main__":
    main()
