"""How the weights of deit_nano_fashion were made: a better teacher, a larger student, more epochs.

    python -m studies.nano_fashion --data /usr/share/datasets/fashion-mnist --work runs/nano

5,000 of the training images are held out, and everything is chosen by them; the test images are
looked at when all runs have ended. Each run is `deit-fast train` in two processes, one run after
the other, and goes on where it stopped when this script is started again. Then the figures are
written to docs/studies/nano_fashion.json, and from that file the page, nano_fashion.md. `--seeds 1`
trains the teacher and the student that is shipped, and no other. `--quick` is a smoke run; give it
another `--docs`. The data is Debian's package dataset-fashion-mnist, or any folder with the same
idx files.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from deit_fast.distill.checkpoints import write_atomically
from deit_fast.distill.datasets import open_images
from studies import runs
from studies.nano_page import page
from studies.nano_plan import HELD_OUT, commands


def main():
    parser = runs.parser_of(__doc__, runs.ROOT / "docs" / "studies")
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, help="3, or 1 with --quick")
    args = parser.parse_args()
    seeds = list(range(args.seeds or (1 if args.quick else 3)))
    args.data, args.work = args.data.resolve(), args.work.resolve()
    hold_out(args.data, args.work / "data")
    for name, command in commands(args.work, seeds, args.quick):
        if not (args.work / name / "result.json").exists():
            run(command)
    runs.write_study(args.docs, "nano_fashion", collect(args.data, args.work, seeds), page)


def hold_out(data: Path, folder: Path) -> None:
    """Write the training images as two sets: HELD_OUT of each class to validate, the others."""
    folder.mkdir(parents=True, exist_ok=True)
    images = open_images(str(data), "train")
    order = np.random.default_rng(0).permutation(len(images))
    held = np.zeros(len(images), bool)
    for label in range(len(images.classes)):
        held[order[images.labels[order] == label][:HELD_OUT]] = True
    for name, chosen in (("train", ~held), ("t10k", held)):
        for kind, values in (("images-idx3", images.pixels), ("labels-idx1", images.labels)):
            some = values[chosen].astype(np.uint8)
            sizes = b"".join(size.to_bytes(4, "big") for size in some.shape)
            content = bytes((0, 0, 8, some.ndim)) + sizes + some.tobytes()
            write_atomically(
                folder / f"{name}-{kind}-ubyte", lambda file, content=content: file.write(content)
            )


def run(command: list[str]) -> None:
    """Run a command that `commands` shows, in this Python, with one thread for each process."""
    program, *options = command
    module = {"torchrun": "torch.distributed.run", "deit-fast": "deit_fast"}[program]
    ended = subprocess.run(
        [sys.executable, "-m", module, *options], env=runs.one_thread(), cwd=runs.ROOT
    )
    if ended.returncode:
        sys.exit(f"{shlex.join(command)}: {ended.returncode}")


def collect(data: Path, work: Path, seeds: list[int]) -> dict:
    """Everything on the page, as data."""
    settings = runs.read_json(work / "student-0" / "settings.json")
    names = ["teacher", *(f"student-{seed}" for seed in seeds)]
    found = []
    for name in names:
        shown = work / f"{name}-test.json"
        if not shown.exists():
            model = work / name / "model"
            run(["deit-fast", "eval", str(data), "--split", "validation", "--model", str(model),
                 "--workers", "0", "--json", str(shown)])  # fmt: skip
        result = runs.read_json(work / name / "result.json")
        found.append({
            "run": name, "parameters": runs.read_json(work / name / "run.json")["params"],
            "epochs": result["epoch"], "validation": result["top1"],
            "test": runs.read_json(shown)["top1"], "seconds": round(result["seconds"]),
        })  # fmt: skip
    return {
        "images": settings["images"]["train"], "held_out": result["images"],
        "tested": runs.read_json(shown)["images"], "recipe": settings["recipe"],
        "seeds": seeds, "runs": found, "versions": runs.versions(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
