"""A recipe for fine-tuning, chosen from the number of images, and the reason for each setting.

The rule is short, and each part has a source:

    epochs         1000 / sqrt(images), from 5 to 60: more updates for more images, as in BiT's
                   HyperRule, but each image is seen less often
    batch          a tenth of the images, as a power of two from 8 to 64
    learning rate  2.5e-4 at 384 features and batch 64; less for wider models in proportion (muP),
                   and with the square root of the batch, as Adam wants it
    layer decay    0.75 from each layer to the one before (BEiT, MAE)
    schedule       a tenth of the epochs is warm-up; the cosine ends at a hundredth of the peak
    augmentation   crops of at least 35%, RandAugment and erasing from 1,000 images on, Mixup from
                   20,000 on (BiT; Steiner et al.); small images are cropped little

Sources: Kolesnikov et al. 2020 (BiT), Steiner et al. 2022 (How to train your ViT?), Bao et al. 2022
(BEiT), He et al. 2022 (MAE), Yang et al. 2021 (muP).
"""

import math
from dataclasses import dataclass
from typing import Any

from deit_fast.distill import recipe as recipes
from deit_fast.distill.recipe import Recipe

LONG, SHORT = 60, 5  # epochs
SMALL_SIDE = 64  # pixels, up to which an image has no detail to spare
AUGMENTED, MIXED = 1000, 20_000  # images from which there is more augmentation
LR, LR_WIDTH, LR_BATCH = 2.5e-4, 384, 64
END = 0.01  # of the peak learning rate


@dataclass(frozen=True)
class Facts:
    """What a plan is made from.

    Attributes:
        images: How many there are to train on.
        counts: Of each class, of those.
        img_size: Pixels of a side that the model sees.
        width: The model's features.
    """

    images: int
    counts: tuple[int, ...]
    img_size: int
    width: int


@dataclass(frozen=True)
class Choice:
    """One setting of a plan, and why it has this value."""

    setting: str
    value: Any
    why: str


@dataclass(frozen=True)
class Plan:
    """A recipe, the reasons for it, and advice that it does not follow by itself."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    advice: tuple[str, ...]


def choose(facts: Facts, given: dict[str, Any] | None = None) -> Plan:
    """Choose a recipe.

    Args:
        facts: About the images and the model.
        given: Settings of the recipe that the user chose; the others follow them.

    Raises:
        ValueError: There are fewer than two images to train on, or a given setting makes no sense
            with the others; the message names the setting.
    """
    given = given or {}
    n = facts.images
    if n < 2:
        raise ValueError(f"data: {n} images to train on, expected 2 or more")
    chosen: dict[str, Choice] = {}

    def put(setting: str, value: Any, why: str) -> Any:
        if setting in given:
            value, why = given[setting], "as given"
        chosen[setting] = Choice(setting, value, why)
        return value

    epochs = put(
        "epochs", max(SHORT, min(LONG, round(1000 / math.sqrt(n)))), f"1000 / sqrt({n:,} images)"
    )
    batch = put("batch", _batch(n), "about a tenth of the images, from 8 to 64")
    peak = put(
        "lr", _two_digits(LR * LR_WIDTH / facts.width * math.sqrt(batch / LR_BATCH)),
        f"for {facts.width} features and batch {batch}",
    )  # fmt: skip
    put("lr_batch", 0, "the learning rate is taken as it is")
    if given.get("lr_batch"):
        peak = peak * batch / given["lr_batch"]
    put("layer_decay", 0.75, "early layers change least")
    put("warmup_epochs", round(epochs / 10, 2), "a tenth of the epochs")
    for name in ("warmup_lr", "min_lr"):
        put(name, peak * END, "a hundredth of the peak")
    put("sched_on_updates", True, "epochs are few")
    put("opt", "adamw", "as the models were trained")
    put("weight_decay", 0.05, "as the models were trained")
    put("clip_grad", 1.0, "single images weigh much in small batches")
    _augment(facts, put)
    put("repeated_aug", 1, "each image once an epoch")
    put("drop_path", 0.0, "few epochs")
    put("ema", 0.0, "too few updates to average")
    recipe = recipes.load("deit", **{**given, **{c.setting: c.value for c in chosen.values()}})
    return Plan(recipe, tuple(chosen.values()), tuple(_advice(facts, recipe)))


def _batch(n):
    batch = 2 ** max(3, min(6, int(math.log2(max(n / 10, 1)))))
    return min(batch, n - n % 2)  # even: Mixup takes pairs


def _two_digits(x):
    return float(f"{x:.1e}")


def _augment(facts, put):
    n, small = facts.images, facts.img_size <= SMALL_SIDE
    few = f"fewer than {AUGMENTED:,} images"
    if small:
        put("scale", 0.8, f"images of {facts.img_size} pixels have no detail to spare")
        put("crop_pct", 1.0, "small images are seen whole")
    else:
        put("scale", 0.35 if n < MIXED else 0.08, "least share of an image that a crop keeps")
        put("crop_pct", 0.9, "as DeiT is evaluated by timm")
    if small or n < AUGMENTED:
        why = "small images" if small else few
        put("auto_augment", "none", why)
        put("color_jitter", 0.0 if small else 0.2, "instead of auto-augment")
        put("erasing", 0.0, why)
    else:
        put("auto_augment", "rand-m9-mstd0.5-inc1", f"{AUGMENTED:,} images and more")
        put("color_jitter", 0.0, "auto-augment has it")
        put("erasing", 0.1, f"{AUGMENTED:,} images and more")
    mixed = n >= MIXED and not small
    why = f"{'' if mixed else 'only '}from {MIXED:,} images on"
    put("mixup", 0.1 if mixed else 0.0, why)
    put("cutmix", 0.0, "few epochs")
    if small:
        put(
            "hflip",
            0.0,
            "small images are often signs; --hflip 0.5 where mirrored ones are as likely",
        )
    else:
        put("hflip", 0.5, "mirrored images are as likely; --hflip 0 for writing and signs")
    put("label_smoothing", 0.1, "labels may be wrong")


def _advice(facts, recipe):
    least, most = min(facts.counts), max(facts.counts)
    balance = getattr(recipe, "balance", "none")
    if most > 10 * max(least, 1) and balance == "none":
        yield (
            f"classes have {least:,} to {most:,} images: --balance sampler shows rare ones more "
            "often"
        )
    if least < 5:
        yield f"a class has {least} images: 20 or more of each are a sound start"


def as_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Setting, value and reason of each choice, as text."""
    return [
        (c.setting.replace("_", "-"), f"{c.value:g}" if type(c.value) is float else str(c.value),
         c.why)
        for c in plan.choices
    ]  # fmt: skip
