"""Table 3 of the DeiT paper on Fashion-MNIST: a small convnet teaches a small DeiT.

    python studies/fashion_mnist.py --data /usr/share/datasets/fashion-mnist --work runs/fashion

Each run is a `deit-fast train` command, `--parallel` of them at a time, and goes on where it
stopped when this script is started again. When all are done, their figures are written to
docs/studies/fashion_mnist.json, and from that file the page, fashion_mnist.md, and by
`python -m benchmarks.pictures` its figures.
`--quick` trains on a part of the images, for minutes instead of hours; give it another `--docs`.
`--least` fails where the distilled model is no better than that.
The data is Debian's package dataset-fashion-mnist, or any folder with the same idx files.
"""

import argparse
import concurrent.futures
import shlex
import statistics
import sys
from pathlib import Path

if not __package__:  # run as a script: its folder is on the path, the repository is not
    sys.path[0] = str(Path(__file__).parents[1])

from studies import runs  # noqa: E402  (not before the path is set)
from studies.runs import spread, table_row  # noqa: E402

DATA = "/usr/share/datasets/fashion-mnist"
STUDENT = [*runs.IMAGES, "--accum", "2", "--model-args", *runs.DEIT_ARGS]
TEACHER = [
    "--model", "resnet18", "--img-size", "28", "--model-args", *runs.RESNET_ARGS,
    "--epochs", "8", "--batch", "256", "--warmup-epochs", "1", "--lr", "1e-3", "--crop", "pad",
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
    parser = runs.parser_of(__doc__, runs.ROOT / "docs" / "studies")
    runs.add_runs(parser)
    parser.add_argument("--seeds", type=int, help="3, or 1 with --quick")
    parser.add_argument("--least", type=float, help="top-1 of the distilled model, percent")
    args = parser.parse_args()
    seeds = range(args.seeds or (1 if args.quick else 3))
    args.data, args.work = str(args.data.resolve()), args.work.resolve()
    runs.run_all(trainings(args, seeds), args.work, args.parallel)

    args.docs.mkdir(parents=True, exist_ok=True)
    study = collect(args, seeds)
    runs.write_study(args.docs, "fashion_mnist", study, page)
    distilled = statistics.mean(study["rows"][-1]["top1"])
    if args.least is not None and distilled < args.least:
        sys.exit(f"top-1 of the distilled model: {distilled:.2f}%, expected {args.least:g}%")


def trainings(args, seeds):
    """(name, command, the name of the run it needs) of each run."""
    yield "teacher", train(args, "teacher", TEACHER), None
    for name, (model, distill) in METHODS.items():
        for seed in seeds:
            more = ["--model", model, *STUDENT, "--seed", str(seed)]
            if distill != "none":
                more += ["--teacher", str(args.work / "teacher" / "model"), "--distill", distill]
            needs = "teacher" if distill != "none" else None
            yield f"{name}-{seed}", train(args, f"{name}-{seed}", more), needs


def train(args, name, more):
    command = ["deit-fast", "train", args.data, "--out", str(args.work / name)]
    command += [*runs.COMMON, *runs.AT_THE_END, *more]
    return command + QUICK * args.quick  # the last of an option counts


def collect(args, seeds):
    """Everything on the page, as data."""
    results = {
        name: [runs.read_json(args.work / f"{name}-{s}" / "result.json") for s in seeds]
        for name in METHODS
    }
    teacher = runs.read_json(args.work / "teacher" / "result.json")
    settings = runs.read_json(args.work / "token-0" / "settings.json")
    shown = args.work / "analysis"
    models = [f"{name}/model" for name in ("teacher", "none-0", "token-0")]
    where = [args.data, "--split", "validation", "--workers", "0", "--out", str(shown)]
    analyses = (
        ["disagreement", *where, "--models", *models], ["tokens", *where, "--model", models[-1]]
    )  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        commands = [["deit-fast", "analyse", *analysis] for analysis in analyses]
        list(pool.map(lambda command: runs.run(command, cwd=args.work), commands))
    pairs = runs.read_json(shown / "disagreement.json")
    cosines = [line.split(",") for line in (shown / "tokens.csv").read_text().splitlines()[1:]]
    rows = [
        {"row": label, "tokens": TOKENS[head], "runs": name, "paper": paper,
         "top1": [result["top1"][head] for result in results[name]]}
        for label, name, head, paper in ROWS
    ]  # fmt: skip
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
        "versions": runs.versions(),
    }  # fmt: skip


def _parameters(out):
    return {"parameters": runs.read_json(out / "run.json")["params"]}


def page(study) -> str:
    """The study as Markdown, from its data alone."""
    recipe, seeds = study["recipe"], study["seeds"]
    lines = [
        "# Distillation through attention on Fashion-MNIST",
        "",
        "Table 3 of the DeiT paper, reduced to a small data set and a small model. "
        "`python studies/fashion_mnist.py` ran it as it stands here; this page is made from "
        "[fashion_mnist.json](fashion_mnist.json).",
        "",
        f"- Data: {study['images']:,} images to train on, {study['tested']:,} to test on, 28 x 28 "
        "grey pixels, 10 classes (Fashion-MNIST, Debian's `dataset-fashion-mnist`).",
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
        "epochs on 12,000 images) without distillation, judged by the test images: that may "
        "flatter the first row. No distilled run was used to choose anything.",
        "",
        "## Which method, which token",
        "",
        "| method | tokens tested | top-1, % | each seed | paper: DeiT-Ti, ImageNet |",
        "|---|---|--:|---|--:|",
    ]
    for row in study["rows"]:
        each = runs.each_value(row["top1"])
        cells = row["row"], row["tokens"], spread(row["top1"]), each, f"{row['paper']:.1f}"
        lines.append(table_row(*cells))
    by_row = {(row["runs"], row["tokens"]): row["top1"] for row in study["rows"]}
    lines += ["", "Mean ± standard deviation over the seeds.", ""] if len(seeds) > 1 else [""]
    lines += [
        "![top-1 of each run](../pictures/fashion_mnist_top1.svg)",
        "",
        *differences(by_row),
        "",
    ]
    names, rates = study["disagreement"]["classifiers"], study["disagreement"]["rates"]
    lines += [
        "## Disagreement between classifiers (Table 4)",
        "",
        "Disagreement rate: the share of test images for which two predict different classes, "
        "first seed:",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'--:|' * len(names)}",
        *(
            f"| {name} | {' | '.join(f'{rate:.3f}' for rate in row)} |"
            for name, row in zip(names, rates, strict=True)
        ),
        "",
        "![disagreement rates](../pictures/fashion_mnist_disagreement.svg)",
        "",
        "## Similarity of the two tokens",
        "",
        "Mean cosine of class and distillation token (the paper: 0.06 at the input, 0.93 at the "
        "last layer):",
        "",
        "| after | cosine |",
        "|---|--:|",
        *(f"| {place} | {cosine:.3f} |" for place, cosine in study["cosines"].items()),
        "",
        "![cosine of the tokens](../pictures/fashion_mnist_tokens.svg)",
        "",
        "## Reproduce",
        "",
        "```bash",
        "apt install dataset-fashion-mnist && pip install -e '.[train]'",
        f"python studies/fashion_mnist.py --data {DATA} --work runs/fashion --parallel 2",
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
    shown = argparse.Namespace(data=DATA, work=Path("runs/fashion"), quick=False)
    for _, command, _ in trainings(shown, [0]):
        yield shlex.join(command)


def seconds(of):
    return ", ".join(f"{name} {'/'.join(map(str, found))}" for name, found in of.items())


if __name__ == "__main__":
    main()
