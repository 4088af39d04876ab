"""The page of the study of soft-label stores, from its data alone."""

import statistics
from pathlib import Path

from studies.runs import each_value, spread, table_row
from studies.store_plan import shown_commands

WAYS = {  # what steps are timed of
    "labels": "labels, no teacher", "store": "soft-label store, K = 10",
    "teacher": "live teacher, the ResNet of this study", "large": "live teacher, ResNet-50",
}  # fmt: skip


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
        "# Training from a soft-label store, on Fashion-MNIST",
        "",
        "TinyViT's fast pretraining distillation, reduced to a small data set and small models. "
        "`python -m studies.store` ran it as it stands here; this page is made from "
        "[store.json](store.json).",
        "",
        f"- Data: the first {plan['count']:,} images of Fashion-MNIST to train on, "
        f"{study['tested']:,} to test on, 28 x 28 grey pixels, 10 classes.",
        f"- Teacher: a ResNet of {parameters['teacher']:,} parameters, {plan['teacher_epochs']} "
        f"epochs on the same images, top-1 {study['teacher_top1']:.2f}%.",
        f"- Student: DeiT with patches of 4, width 64, 4 blocks, 2 heads: "
        f"{parameters['student']:,} parameters; {plan['epochs']} epochs, batch {plan['batch']}, "
        "lr 3e-3, else `studies/fashion.json`.",
        f"- {seeds} seed{'s' * (seeds > 1)} of the student, one store for all; the model of the "
        "last epoch. Nothing was chosen by these results.",
        f"- On a CPU alone ({machine['cpu']}, {machine['cores']} cores that had other work too), "
        "fp32, plain PyTorch: no Triton kernel ran, and no GPU was measured.",
        "",
        "## What a step costs",
        "",
        f"Batch {plan['batch']}, one thread, one process at a time; the step with decoding, "
        f"augmentation, loss, backward and update: its CPU time, and its wall-clock time, which "
        f"other work on the machine disturbs. Median of {plan['repeats']} processes of "
        f"{plan['steps']} steps, lowest to highest; the most resident memory of the whole process "
        "in these steps, of which Python and PyTorch are the larger part.",
        "",
        "| learns from | teacher's parameters | CPU, ms a step | relative to the store | wall, ms "
        "a step | peak MiB |",
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
        lines.append(table_row(*cells))
    lines += [
        "",
        "## Accuracy against K",
        "",
        "| learns from | top-1, % | each seed | probability stored | bytes a record | store, bytes "
        "| check: mean difference | different indices |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in study["rows"]:
        each = each_value(row["top1"])
        cells = [label_of(row["run"]), spread(row["top1"]), each]
        if "check" in row:
            cells += [
                f"{100 * row['kept']:.1f}%", str(row["record"]), f"{row['bytes']:,}",
                f"{row['check']['mean_difference']:.1e}",
                f"{100 * row['check']['different_indices']:.2f}%",
            ]  # fmt: skip
        else:
            cells += ["–"] * 5
        lines.append(table_row(*cells))
    same = all(row["bytes"] == row["predicted"] for row in study["rows"] if "check" in row)
    shown = Path("runs/store")
    lines += [
        "",
        "![top-1 of each run](../pictures/store_top1.svg)",
        "",
        f"{'Mean ± standard deviation over the seeds. ' if seeds > 1 else ''}With the live teacher "
        "the student learns by soft distillation of weight 1 at temperature 1, which is what a "
        "store with K = C teaches. `deit-fast distill-store check` asked the teacher again for as "
        "many records as an epoch has. The stores are "
        + ("exactly as large as was predicted." if same else "NOT as large as was predicted."),
        "",
        *findings(study),
        "",
        "## Reproduce",
        "",
        "```bash",
        "apt install dataset-fashion-mnist && pip install -e '.[train]'",
        "python -m studies.store --data /usr/share/datasets/fashion-mnist --work runs/store "
        f"--parallel {machine['parallel']}",
        "```",
        "",
        "which runs, on a folder with so many of the images and with each K and seed:",
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
            f"- From the store a step takes {abs(less):.0f}% {'less' if less > 0 else 'MORE'} CPU "
            f"time and the process {abs(memory[way] - memory['store']):.0f} MiB "
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
