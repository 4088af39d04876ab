"""Loss and accuracy after each epoch of short training runs on Fashion-MNIST.

    python -m studies.curves --data /usr/share/datasets/fashion-mnist --work runs/curves

The store study's teacher and student (store_plan.py), evaluated after each epoch: the teacher, a
DeiT without distillation, and a DeiT with the distillation token. Each run is a `deit-fast train`
command, and goes on where it stopped when this script is started again. The figures are written to
docs/studies/curves.json, and from that file the page, curves.md; `python -m benchmarks.pictures`
draws them. `--quick` is a smoke run; give it another `--docs`.
"""

import csv
import shlex
from pathlib import Path

from studies import runs
from studies.store_plan import TEACHER

DATA = "/usr/share/datasets/fashion-mnist"
PICTURE = "../pictures/training.svg"
STUDENT = [
    *runs.IMAGES, "--accum", "2", "--model-args", *runs.DEIT_ARGS, "--lr", "3e-3",
]  # fmt: skip
MODELS = {  # name of the run -> what it is, options
    "teacher": ("ResNet, the teacher", TEACHER),
    "none": ("DeiT without distillation", ["--model", "deit_tiny", *STUDENT]),
    "token": (
        "DeiT with the distillation token", ["--model", "deit_tiny_distilled", *STUDENT]
    ),
}  # fmt: skip
FULL = {"count": 5000, "epochs": 10, "batch": 64}
QUICK = {"count": 512, "epochs": 2, "batch": 32}


def main():
    parser = runs.parser_of(__doc__, runs.ROOT / "docs" / "studies")
    runs.add_runs(parser)
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    work = args.work.resolve()
    runs.run_all(commands(str(args.data.resolve()), work, plan), work, args.parallel)
    runs.write_study(args.docs, "curves", collect(work, plan), page)


def commands(data: str, work: Path, plan: dict):
    """(name, command, the name of the run it needs) of each run."""
    for name, (_, options) in MODELS.items():
        command = ["deit-fast", "train", data, "--out", str(work / name), *runs.COMMON, *options]
        for option, value in plan.items():
            command += [f"--{option}", str(value)]
        if name == "token":
            command += ["--teacher", str(work / "teacher" / "model"), "--distill", "hard"]
        yield name, command, "teacher" if name == "token" else None


def collect(work: Path, plan: dict) -> dict:
    """Everything on the page, as data."""
    found = []
    for name, (label, _) in MODELS.items():
        with (work / name / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        head = next(h for h in ("top1/joint", "top1/class") if h in rows[0])
        found.append({
            "run": name, "label": label,
            "loss": [round(float(row["loss"]), 4) for row in rows],
            "top1": [round(float(row[head]), 2) for row in rows],
        })  # fmt: skip
    tested = runs.read_json(work / "teacher" / "result.json")["images"]
    return {"plan": plan, "tested": tested, "runs": found, "versions": runs.versions()}


def page(study: dict) -> str:
    """The study as Markdown, from its data alone."""
    plan, versions = study["plan"], study["versions"]
    lines = [
        "# Training curves on Fashion-MNIST",
        "",
        f"Loss and accuracy after each of {plan['epochs']} epochs on {plan['count']:,} "
        f"images, batch {plan['batch']}, tested on {study['tested']:,} images: a ResNet, a DeiT of "
        "the same size as `deit_nano_fashion` without distillation, and one with the distillation "
        "token that learns from the ResNet (hard distillation). One seed each, fp32, on a CPU, "
        "plain PyTorch. One seed shows the course of training and does not rank the methods: "
        "[the study with three seeds](fashion_mnist.md) does. This page is made from "
        "[curves.json](curves.json).",
        "",
        f"![Loss and top-1 by epoch]({PICTURE})",
        "",
        "The losses of the three are not of one kind: with distillation half of the loss is the "
        "cross-entropy with the teacher's decision.",
        "",
        "| run | loss, first epoch | loss, last epoch | top-1, first epoch, % "
        "| top-1, last epoch, % |",
        "|---|--:|--:|--:|--:|",
    ]
    for run in study["runs"]:
        ends = [f"{run['loss'][i]:.3f}" for i in (0, -1)]
        ends += [f"{run['top1'][i]:.2f}" for i in (0, -1)]
        lines.append(runs.table_row(run["label"], *ends))
    lines += [
        "",
        "## Reproduce",
        "",
        "```bash",
        "apt install dataset-fashion-mnist && pip install -e '.[train]'",
        f"python -m studies.curves --data {DATA} --work runs/curves --parallel 2",
        "```",
        "",
        "which runs:",
        "",
        "```bash",
        *(shlex.join(command) for _, command, _ in commands(DATA, Path("runs/curves"), plan)),
        "```",
        "",
        f"torch {versions['torch']}, timm {versions['timm']}, Python {versions['python']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
