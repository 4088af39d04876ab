"""The page of the study of deit_nano_fashion, from its data alone."""

from studies import runs
from studies.nano_plan import DATA, shown_commands
from studies.runs import spread, table_row

HEADS = {
    "class": "class", "distill": "distillation", "joint": "both, mean of the logits (default)",
    "joint_softmax": "both, sum of the softmax outputs",
}  # fmt: skip


def page(study: dict) -> str:
    """The study as Markdown."""
    teacher, *students = study["runs"]
    recipe, seeds = study["recipe"], study["seeds"]
    first = students[0]
    several = len(seeds) > 1
    lines = [
        "# The weights of deit_nano_fashion",
        "",
        "`python -m studies.nano_fashion` made them as it stands here; this page is made from "
        "[nano_fashion.json](nano_fashion.json). What distillation gains is another study: "
        "[methods of distillation](fashion_mnist.md).",
        "",
        f"- Data: Fashion-MNIST (Debian's `dataset-fashion-mnist`), 28 x 28 grey pixels, 10 "
        f"classes: {study['images']:,} images to train on, {study['held_out']:,} of its training "
        f"images held out, as many of each class, and its {study['tested']:,} test images.",
        f"- Teacher: a ResNet (timm's `resnet18d`, narrower) of {teacher['parameters']:,} "
        f"parameters, {teacher['epochs']} epochs: top-1 {teacher['validation']['class']:.2f}% of "
        f"the images held out, {teacher['test']['class']:.2f}% of the test images.",
        f"- Student: `deit_nano_fashion`, patches of 4, width 128, 4 blocks, 2 heads: "
        f"{first['parameters']:,} parameters with the distillation token.",
        f"- Recipe: hard distillation through the distillation token, {recipe['epochs']} epochs, "
        f"batch {recipe['batch']}, {recipe['opt']}, lr {recipe['lr']:g} with "
        f"{recipe['warmup_epochs']:g} of warm-up, weight decay {recipe['weight_decay']:g}, "
        f"gradients clipped at {recipe['clip_grad']:g}, crops of images padded by 4 pixels, "
        f"mirrored, label smoothing {recipe['label_smoothing']:g}; no Mixup, no CutMix.",
        "- bf16 under autocast, on two cores of a CPU, plain PyTorch; tested in fp32.",
        f"- {len(seeds)} seed{'s' * several}, the model of the last epoch. The first seed is the "
        "one that is shipped, whatever the others give.",
        "",
        "## Top-1",
        "",
        "| head | held out, % | test images, % |" + " test, each seed |" * several,
        "|---|--:|--:|" + "---|" * several,
    ]
    for head, name in HEADS.items():
        held, tested = ([of[split][head] for of in students] for split in ("validation", "test"))
        each = [runs.each_value(tested)] if several else []
        lines.append(table_row(name, spread(held), spread(tested), *each))
    lines += ["", "Mean ± standard deviation over the seeds."] if several else []
    lines += [
        "",
        *CHOSEN,
        "",
        "## Reproduce",
        "",
        "```bash",
        "apt install dataset-fashion-mnist && pip install -e '.[train]'",
        f"python -m studies.nano_fashion --data {DATA} --work runs/nano",
        "```",
        "",
        "which writes the two sets of training images to `runs/nano/data`, and runs, for the "
        "teacher and for each seed:",
        "",
        "```bash",
        *shown_commands(),
        "```",
        "",
        f"Seconds of training, in two processes: {seconds(study['runs'])} (torch "
        f"{study['versions']['torch']}, timm {study['versions']['timm']}; the cores had other "
        "work too).",
    ]
    return "\n".join(lines) + "\n"


CHOSEN = [
    "## What was chosen, and how",
    "",
    "TODO",
]


def seconds(of: list[dict]) -> str:
    return ", ".join(f"{run['run']} {run['seconds']:,}" for run in of)
