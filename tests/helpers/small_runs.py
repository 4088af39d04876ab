"""Small training runs on made-up images. As a script: a run that is killed again and again:

python small_runs.py DATA OUT KILLS SEED [MODE]
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from checking import seeded
from PIL import Image

import deit_fast
from deit_fast.distill import checkpoints, recipe
from deit_fast.distill.datasets import open_images
from deit_fast.distill.student import Settings
from deit_fast.distill.train import train

# everything that draws random numbers, and everything that keeps a state
RECIPE = {
    "epochs": 3, "batch": 8, "lr": 1e-3, "lr_batch": 0, "warmup_epochs": 1, "drop": 0.1,
    "drop_path": 0.2, "repeated_aug": 1, "ema": 0.9, "clip_grad": 1.0, "crop_pct": 1.0,
}  # fmt: skip
MODEL_ARGS = {"embed_dim": 32, "depth": 2, "num_heads": 1, "patch_size": 8}


def image_folders(folder: Path, classes=3, each=8, size=16, splits=("train", "val")) -> Path:
    """Folders of classes: noise around a colour that tells the class."""
    draw = np.random.default_rng(seeded(0))
    for split in splits:
        for c in range(classes):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(each):
                noise = draw.integers(-60, 60, (size, size, 3))
                colour = np.array([60, 120, 190])[(np.arange(3) + c) % 3]
                pixels = (colour + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{c}" / f"{i}.png")
    return folder


def small_teacher(folder: Path, classes=3, seed=0, in_chans=3, data=None) -> Path:
    """A convnet in a folder, whose outputs are neither sure nor all alike. Of images in `data` no
    class gets all."""
    torch.manual_seed(seeded(seed))
    model = timm.create_model("test_resnet", num_classes=classes, in_chans=in_chans)
    if in_chans == 1:
        model.pretrained_cfg = dict(model.pretrained_cfg) | {"mean": (0.286,), "std": (0.353,)}
    model.fc.weight.data.mul_(30)
    if data is not None:
        images = open_images(data, "train")
        pixels = np.stack([np.asarray(images.image(i)) for i in range(len(images))])
        with torch.no_grad():
            said = model.eval()((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
            model.fc.bias -= said.mean(0)
    deit_fast.save_pretrained(model, folder)
    return folder


def settings(data, model="deit_tiny_distilled", model_args=None, **kwargs) -> Settings:
    ours = kwargs.get("start") is None and model.startswith("deit")
    given, size = (MODEL_ARGS, 16) if ours else ({}, None)
    return Settings(str(data), model, given | (model_args or {}), **{"img_size": size} | kwargs)


def options_of(**kwargs) -> list[str]:
    """As on the command line: a small model, and what is given."""
    given = {"batch": 8, "epochs": 2, "warmup-epochs": 1, "lr": 1e-3, "lr-batch": 0, "ema": 0}
    given |= {"repeated-aug": 1, "img-size": 16, "model": "deit_tiny"} | kwargs
    pairs = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [*pairs, "--model-args", *(f"{k}={v}" for k, v in MODEL_ARGS.items())]


def run(data, out, save_every=1000, workers=0, report=lambda event: None, restart=False,
        recipe_of=None, recipe_name=None, **kwargs):  # fmt: skip
    """Train, by a recipe made small or by one of ours; returns the checkpoint at the end."""
    small = RECIPE if recipe_name is None else {}
    chosen = recipe.load(recipe_name or "deit", **small | (recipe_of or {}))
    train(
        settings(data, **kwargs), chosen, out, save_every=save_every, workers=workers,
        report=report, restart=restart,
    )  # fmt: skip
    return checkpoints.load(Path(out, "checkpoint.pt"))


class Stop(Exception):
    pass


def stop_at(epoch, update):
    """A `report` that ends a run just after that update and before saving it."""

    def report(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (epoch, update):
            raise Stop

    return report


def start(data, out, epoch=1, update=2, **kwargs):
    """A run that ends there, each update before it saved."""
    with pytest.raises(Stop):
        run(data, out, report=stop_at(epoch, update), save_every=1, **kwargs)


def same(a, b) -> bool:
    """Whether two checkpoints hold the same bits, but for times."""
    if isinstance(a, dict):
        timed = {"seconds", "images_per_s"}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a.keys() - timed)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


KILLED = {"recipe_of": {"epochs": 20}, "save_every": 1}  # longer than the kills leave time for
MODES = {  # of training: options of `run`
    "whole model": {},
    "freeze": {"recipe_of": {"freeze": 1, "balance": "sampler"}, "best": "balanced"},
    "best": {"recipe_of": {"balance": "loss"}, "best": "loss", "patience": 50},
    "lora": {"lora": 2, "best": "top1"},
}


def both(options, more):
    """Options of `run`, those for the recipe together."""
    chosen = {"recipe_of": options.get("recipe_of", {}) | more.get("recipe_of", {})}
    return options | more | chosen


def killed(mode="whole model"):
    return both(KILLED, MODES[mode])


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def written(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_again_and_again(data, out, kills, seed, mode="whole model"):
    """Start the run, kill it a random time after it has saved something new, as often as asked;
    then let it finish. Prints each exit code and how far the checkpoint was."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    path = Path(out, "checkpoint.pt")
    if mode == "lora":
        import peft  # noqa: F401
    for kill in (*[True] * kills, False):
        child = os.fork()  # spares the seconds of importing
        if child == 0:
            try:
                run(data, out, **killed(mode))
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
        if kill:
            before = written(path)
            while written(path) == before and not ended(child):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        state = checkpoints.load(path) if path.exists() else {"epoch": 0, "update": 0}
        print(code, state["epoch"], state["update"], flush=True)


if __name__ == "__main__":
    kill_again_and_again(*sys.argv[1:3], *map(int, sys.argv[3:5]), *sys.argv[5:])
