"""Fine-tuning from a folder of images to a model: the plan, perhaps a teacher, and the runs.

plan      a recipe for these images (plan.py), and the minutes that it should take
teacher   with "auto" a larger model, fine-tuned first
runs      one, or one for each of several seeds; each goes on where it stopped
"""

import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deit_fast import _names
from deit_fast.distill import run_folder
from deit_fast.distill.datasets import ImageSet
from deit_fast.distill.recipe import load as load_recipe
from deit_fast.distill.student import AMP, Settings, build_student
from deit_fast.engine import data_config

from . import plan as plans

PLAN, TEACHER = "plan.json", "teacher"
MEASURED = {"cpu": 8, "cuda": 64}  # images of the step that is timed, at most
EVALUATION = 1 / 3  # of the time of a training step, for an image
SPENT = 0.9  # of the time that is given, what a plan fills
# A distilled model learns from the next larger one, the largest from the paper's convnet
LARGER = {
    "deit_tiny": "deit_small", "deit_small": "deit_base", "deit_base": "regnety_160",
    "deit_tiny_distilled": "deit_small_distilled", "deit_small_distilled": "deit_base_distilled",
    "deit_base_distilled": "regnety_160",
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """What is going to be done.

    Attributes:
        plan: The recipe, with reasons.
        images: How many to train on.
        validation: How many to evaluate on.
        classes: Their names.
        minutes: That it should take here, measured by one step; None where nothing was measured.
    """

    plan: plans.Plan
    images: int
    validation: int
    classes: list[str]
    minutes: float | None


def make_plan(
    settings: Settings, given: dict, *, seconds: float | None = None, device: str = "cpu"
) -> Planned:
    """Open the images, build the model, time one training step and choose a recipe.

    Args:
        settings: Of the run.
        given: Settings of the recipe that the user chose.
        seconds: The time that training may take: it decides the epochs.
        device: Where it will train.

    Raises:
        ValueError: Settings, images and model do not fit, or one epoch takes longer than `seconds`.
        FileNotFoundError: Data or weights are missing.
    """
    images, validation, model = build_student(settings, _any_recipe(given))
    facts = facts_of(images, model)
    planned = plans.choose(facts, given)
    each = seconds_per_image(model.to(device), settings.amp, facts.img_size, planned.recipe.batch)
    epoch = each * (len(images) + EVALUATION * len(validation))
    if seconds is not None and "epochs" not in given:
        epochs = math.floor(SPENT * seconds / epoch)
        if epochs < 1:
            raise ValueError(
                f"time: {seconds / 60:.1f} minutes, expected {epoch / SPENT / 60:.1f} or more: one "
                f"epoch of {len(images)} images takes about {epoch / 60:.1f}. A smaller model, "
                "--freeze backbone or --count would take less"
            )
        epochs = min(epochs, planned.recipe.epochs)
        planned = plans.choose(facts, {"epochs": epochs, **given})
    minutes = planned.recipe.epochs * epoch / 60
    return Planned(planned, len(images), len(validation), images.classes, minutes)


def _any_recipe(given):
    """A recipe to build a model by, before one is chosen."""
    named = {k: v for k, v in given.items() if k in ("drop", "drop_path", "crop_pct")}
    return load_recipe("deit", **{"drop_path": 0.0} | named)


def facts_of(images: ImageSet, model: nn.Module) -> plans.Facts:
    """What a plan depends on."""
    counts = torch.bincount(torch.from_numpy(images.labels), minlength=len(images.classes))
    return plans.Facts(
        len(images), tuple(counts.tolist()), data_config(model)["input_size"][1],
        int(model.num_features),  # type: ignore[arg-type]
    )  # fmt: skip


def seconds_per_image(model: nn.Module, amp: str, img_size: int, batch: int) -> float:
    """Time training steps, and take the quickest of three.

    Args:
        model: On its device; its gradients are dropped.
        amp: "none", "bf16" or "fp16".
        img_size: Pixels of a side.
        batch: Of the recipe.
    """
    like = next(model.parameters())
    kind, dtype = like.device.type, AMP[amp]
    channels = data_config(model)["input_size"][0]
    images = torch.zeros(
        min(batch, MEASURED[kind]), channels, img_size, img_size, device=like.device
    )
    model.train()
    least = math.inf
    for i in range(4):
        began = time.perf_counter()
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            out = model(images)
        out = out if isinstance(out, tuple) else (out,)
        torch.stack([t.float().square().mean() for t in out]).sum().backward()
        model.zero_grad(set_to_none=True)
        if kind == "cuda":
            torch.cuda.synchronize()
        if i:  # the first one warms up
            least = min(least, time.perf_counter() - began)
    return least / len(images)


def write_plan(out: Path, planned: Planned, asked: dict) -> None:
    """Write plan.json: what was asked for and what was chosen."""
    content = {
        "asked": asked, "images": planned.images, "validation": planned.validation,
        "classes": len(planned.classes), "minutes": planned.minutes,
        "recipe": dataclasses.asdict(planned.plan.recipe),
        "choices": [dataclasses.asdict(choice) for choice in planned.plan.choices],
        "advice": list(planned.plan.advice),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(out / PLAN, content)


def kept_epochs(out: Path, asked: dict) -> int | None:
    """The epochs of the plan that `out` holds, if the same was asked for.

    A run that goes on has to have those it began with, however fast the machine is today.
    """
    try:
        content = json.loads((out / PLAN).read_text(encoding="utf-8"))
        return int(content["recipe"]["epochs"]) if content["asked"] == asked else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def larger(settings: Settings) -> str:
    """The name of the model that teaches this one.

    Raises:
        ValueError: None is known.
    """
    name = {timms: ours for ours, timms in _names.MODELS.items()}.get(
        settings.model or "", settings.model
    )
    if settings.start != "pretrained" or name not in LARGER:
        what = settings.start if name is None else name
        raise ValueError(
            f"teacher: 'auto' for {what}, expected one of {', '.join(LARGER)} from 'pretrained'; "
            "else fine-tune a teacher first and name its folder"
        )
    return LARGER[name]


def teacher_settings(settings: Settings) -> Settings:
    """Settings of the larger model, which learns without a teacher."""
    return dataclasses.replace(
        settings, model=larger(settings), start="pretrained", distill="none", teacher=None
    )


def several(out: Path, seeds: list[int], run: Callable[[Path, int], dict]) -> dict:
    """Make one run for each seed, and take the model that validated best.

    Args:
        out: Gets a folder for each seed, model/ of the best one, and result.json.
        seeds: Of the runs.
        run: (folder, seed) -> the content of the run's result.json.

    Returns:
        The content of result.json: of each head mean and standard deviation, the best seed by what
        the model returns, and each seed's result.
    """
    results = {seed: run(out / f"seed-{seed}", seed) for seed in seeds}
    scores = {
        head: [result["top1"][head] for result in results.values()]
        for head in results[seeds[0]]["top1"]
    }
    deciding = scores.get("joint", scores["class"])
    best = seeds[max(range(len(seeds)), key=lambda i: (deciding[i], -i))]
    result = {
        "top1": {head: statistics.fmean(found) for head, found in scores.items()},
        "spread": {
            head: statistics.stdev(found) if len(found) > 1 else 0.0
            for head, found in scores.items()
        },
        "best": best,
        "images_per_s": statistics.median(r["images_per_s"] for r in results.values()),
        "unreadable": max(r["unreadable"] for r in results.values()),
        "seeds": {str(seed): result for seed, result in results.items()},
    }  # fmt: skip
    _copy(out / f"seed-{best}" / run_folder.MODEL, out / run_folder.MODEL)
    run_folder.write_json(out / run_folder.RESULT, result)
    return result


def _copy(folder: Path, to: Path) -> None:
    """A copy of a folder, which takes the place of another whole."""
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    shutil.rmtree(to, ignore_errors=True)
    part.rename(to)


def seconds_of(text: str) -> float:
    """Seconds of "90s", "30m" or "2h"; a number alone is minutes.

    Raises:
        ValueError: It is something else, or not above 0.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "m")
    try:
        found = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise ValueError(f"time: {text!r}, expected such as 90s, 30m or 2h")
    return found
