"""The runs of the study of deit_nano_fashion: what is trained, and with which command."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from studies import runs

HELD_OUT = 500  # training images of each class, to validate
DATA = Path("/usr/share/datasets/fashion-mnist")
SHARED = [*runs.COMMON, *runs.IMAGES, "--amp", "bf16", "--crop", "pad"]
TEACHER = [
    "--model", "resnet18d", "--model-args", "in_chans=1", "replace_stem_pool=True",
    "channels=[64,128,192,256]", "layers=[2,2,1,1]", "--epochs", "13", "--batch", "256",
    "--lr", "3e-3", "--warmup-epochs", "1", "--erasing", "0.1", "--ema", "0.995",
]  # fmt: skip
STUDENT = [
    "--model", "deit_nano_fashion", "--distill", "hard", "--epochs", "24", "--batch", "128",
    "--lr", "2e-3", "--warmup-epochs", "1", "--clip-grad", "1", "--ema", "0.998",
]  # fmt: skip
QUICK = "--count 1000 --epochs 2 --batch 50 --warmup-epochs 0.5".split()
PARALLEL = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "deit_fast", "train"]


def commands(work: Path, seeds: list[int], quick: bool) -> Iterator[tuple[str, list[str]]]:
    """(name of the run, command) of each run, in order: a student needs the teacher."""
    teacher = ["--teacher", str(work / "teacher" / "model")]
    plan = [("teacher", TEACHER)]
    plan += [(f"student-{seed}", [*STUDENT, *teacher, "--seed", str(seed)]) for seed in seeds]
    for name, options in plan:
        where = [str(work / "data"), "--out", str(work / name)]
        yield name, [*PARALLEL, *where, *SHARED, *options, *(QUICK if quick else [])]


def shown_commands() -> list[str]:
    """The commands of the teacher and of the student that is shipped, as one would type them."""
    return [shlex.join(command) for _, command in commands(Path("runs/nano"), [0], False)]
