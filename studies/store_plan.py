"""The runs of the study of soft-label stores."""

import shlex
from pathlib import Path

from studies import runs

TEACHER = [
    "--model", "resnet18", *runs.IMAGES, "--model-args", *runs.RESNET_ARGS,
    "--lr", "1e-3", "--warmup-epochs", "1",
]  # fmt: skip
SOFT = ["--distill", "soft", "--soft-weight", "1", "--temperature", "1"]  # as a store with K = C
FULL = {"count": 5000, "test": 10_000, "epochs": 5, "teacher_epochs": 10, "ks": [1, 2, 5, 10],
        "seeds": [0, 1], "batch": 64, "steps": 40, "repeats": 3}  # fmt: skip
QUICK = {"count": 512, "test": 200, "epochs": 1, "teacher_epochs": 1, "ks": [10],
         "seeds": [0], "batch": 32, "steps": 4, "repeats": 1}  # fmt: skip


def commands(work: Path, plan: dict):
    """(name, command, the name of the command it needs) of everything but the clock."""
    learn = [*runs.COMMON, *runs.AT_THE_END, "--batch", str(plan["batch"])]
    data = str(work / "data")
    epochs = ["--epochs", str(plan["epochs"])]
    teacher = ["--teacher", str(work / "teacher" / "model")]
    yield "teacher", [
        "deit-fast", "train", data, "--out", str(work / "teacher"), *learn, *TEACHER,
        "--epochs", str(plan["teacher_epochs"]),
    ], None  # fmt: skip
    ask = [*teacher, *runs.COMMON, "--img-size", "28"]
    for k in plan["ks"]:
        yield f"store-{k}", [
            "deit-fast", "distill-store", "write", data, str(work / f"store-{k}"), *ask, *epochs,
            "--k", str(k),
        ], "teacher"  # fmt: skip
    yield "timed", [
        "deit-fast", "distill-store", "write", str(work / "timed"), str(work / "timed-store"),
        *ask, "--epochs", "1", "--k", "10",
    ], "teacher"  # fmt: skip
    model = ["--model", "deit_tiny", "--model-args", *runs.DEIT_ARGS]
    for seed in plan["seeds"]:
        student = [*learn, *epochs, "--lr", "3e-3", "--seed", str(seed), *model]

        def out(name, seed=seed):
            return f"{name}-{seed}", ["--out", str(work / f"{name}-{seed}")]

        name, where = out("labels")
        yield name, ["deit-fast", "train", data, *where, *student, *runs.IMAGES], None
        name, where = out("live")
        yield name, [
            "deit-fast", "train", data, *where, *student, *runs.IMAGES, *teacher, *SOFT
        ], "teacher"  # fmt: skip
        for k in plan["ks"]:
            name, where = out(f"k{k}")
            yield name, [
                "deit-fast", "train", data, "--store", str(work / f"store-{k}"), *where, *student
            ], f"store-{k}"  # fmt: skip


def shown_commands(work):
    """The commands with the largest K and the first seed, as one would type them."""
    k, seed = FULL["ks"][-1], FULL["seeds"][0]
    wanted = ("teacher", f"store-{k}", f"labels-{seed}", f"live-{seed}", f"k{k}-{seed}")
    for name, command, _ in commands(work, FULL):
        if name in wanted:
            yield shlex.join(command)
