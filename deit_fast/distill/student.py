"""What is trained on what: the settings of a run, its images and its model."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from deit_fast import _names
from deit_fast._names import DISTILLATIONS, METRICS
from deit_fast.engine import data_config
from deit_fast.models import architecture, create_model
from deit_fast.pretrained import describe, from_pretrained

from .datasets import ImageSet, fraction, open_images
from .recipe import Recipe
from .teacher import at_size

# What a run passes itself, and by what it decides
TAKEN = {
    "num_classes": "the data",
    "img_size": "img_size",
    "drop_path_rate": "the recipe's drop_path",
    "pretrained": "start",
    "checkpoint": "start",
    "checkpoint_key": "start_key",
    "backend": "backend",
} | dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate"), "the recipe's drop")
AMP = {name: getattr(torch, _names.DTYPES.get(name, name), None) for name in _names.AMP}


@dataclass(frozen=True)
class Settings:
    """What is trained on what; with a `Recipe` it decides every bit of the result.

    Attributes:
        data: See `datasets.open_images`.
        model: One of ours or any timm name. None takes what the folder `start` holds.
        model_args: timm's keyword arguments.
        start: A folder with weights (`save_pretrained`, OUT/model of a run), a checkpoint file, or
            "pretrained" for timm's from the hub.
        start_key: Entry of that file, see `deit_fast.checkpoint.read_checkpoint`.
        distill: "none", "soft" or "hard", from `teacher`.
        teacher: See `teacher.load_teacher`.
        teacher_checkpoint: File of its weights.
        teacher_checkpoint_key: Entry of that file.
        store: A folder that `store.write` filled, to learn from instead of a live teacher. It
            decides img_size, mean, std and count, and what of the recipe makes the views.
        img_size: Pixels of a side. None: the model's own.
        mean: Of each channel, subtracted from pixels in 0..1. None: the model's own, for grey
            images their mean.
        std: Of each channel, by which pixels are then divided. None: as for `mean`.
        count: Train on so many images only.
        seed: Of initialisation, order, augmentation and dropout.
        accum: Parts that a batch is computed in, one after the other.
        amp: "none", "bf16" or "fp16".
        compile: A mode of torch.compile, or None.
        backend: See `deit_fast.accelerate`.
        image_key: Column of a Hugging Face dataset.
        label_key: Column of a Hugging Face dataset.
        lora: Rank of the adapters that are trained instead of the blocks' weights, see `adapters`;
            0: none.
        patience: Epochs after the best one, by `best`, at which the run stops; 0: never.
        best: Which epoch's weights the run ends with: the best by "top1" or "balanced" (percent,
            of `joint` for a distilled model), or by the "loss", all of the validation images; ""
            takes the last epoch.
    """

    data: str
    model: str | None = None
    model_args: dict = field(default_factory=dict)
    start: str | None = None
    start_key: str | None = None
    distill: str = "none"
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    teacher_checkpoint_key: str | None = None
    store: str | None = None
    img_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    count: int | None = None
    seed: int = 0
    accum: int = 1
    amp: str = "none"
    compile: str | None = None
    backend: str = "auto"
    image_key: str = "image"
    label_key: str = "label"
    lora: int = 0
    patience: int = 0
    best: str = ""

    def __post_init__(self):
        for name in ("accum", "count", "img_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}, expected 1 or more")
        for name in ("lora", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 or more")
        if self.best not in ("", *METRICS):
            raise ValueError(f"best: {self.best!r}, expected '' or one of {', '.join(METRICS)}")
        if self.patience and not self.best:
            raise ValueError(
                f"patience: {self.patience} with no metric, expected one as best: "
                f"{', '.join(METRICS)} (--best)"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: {self.seed}, expected 0 to 2**32 - 1")
        if self.distill not in DISTILLATIONS:
            raise ValueError(f"distill: {self.distill!r}, expected one of {DISTILLATIONS}")
        if taken := sorted(self.model_args.keys() & TAKEN.keys()):
            raise ValueError(f"model_args: {taken[0]} is decided by {TAKEN[taken[0]]}")
        if self.amp not in AMP:
            raise ValueError(f"amp: {self.amp!r}, expected one of {', '.join(AMP)}")
        if self.model is None and self.start is None:
            raise ValueError("model: none, expected a name, or a folder to start from")
        if self.store is not None and self.distill != "none":
            raise ValueError(
                f"distill: {self.distill!r} with a store, expected 'none': nothing but what is "
                "stored is learnt"
            )
        if (self.distill == "none") != (self.teacher is None):
            given = "none" if self.teacher is None else self.teacher
            raise ValueError(
                f"teacher: {given}, with distill {self.distill!r}; expected both or neither"
            )


def build_student(settings: Settings, recipe: Recipe) -> tuple[ImageSet, ImageSet, nn.Module]:
    """Open the data and build the model for it.

    Returns:
        Images to train on, images to evaluate on, and the model, on the CPU, with its normalisation
        and class names in its `pretrained_cfg`.

    Raises:
        ValueError: Settings, data and model do not fit.
        FileNotFoundError: Data or weights are missing.
    """
    keys: dict[str, Any] = {"image_key": settings.image_key, "label_key": settings.label_key}
    images = open_images(settings.data, "train", **keys)
    validation = open_images(settings.data, "validation", classes=images.classes, **keys)
    torch.manual_seed(settings.seed)
    model = _build(settings, recipe, len(images.classes))
    config = data_config(model)
    channels, *size = config["input_size"]
    if settings.img_size is not None:  # convnets take any
        size = [settings.img_size] * 2
    if channels not in (1, 3):
        raise ValueError(f"model: {channels} channels, expected 1 or 3")
    images.mode = validation.mode = {1: "L", 3: "RGB"}[channels]
    if settings.count is not None:
        images = fraction(images, settings.count, settings.seed)
    means = {}
    for key in ("mean", "std"):
        values = getattr(settings, key) or config[key]
        if channels == 1 and getattr(settings, key) is None:
            values = (sum(values) / len(values),)
        if len(values) != channels or key == "std" and min(values) <= 0:
            raise ValueError(f"{key}: {values}, expected {channels} numbers, those of std above 0")
        means[key] = tuple(values)
    resizing = recipe.interpolation if recipe.interpolation != "random" else "bicubic"
    cfg: Any = model.pretrained_cfg
    cfg = dict(cfg) | means | {
        "num_classes": len(images.classes), "input_size": (channels, *size),
        "label_names": list(images.classes), "label_descriptions": None,
        "crop_pct": recipe.crop_pct, "interpolation": resizing,
        "tag": "", "hf_hub_id": None, "url": "",  # the weights are no longer those
    }  # fmt: skip
    model.pretrained_cfg = cfg
    return images, validation, model


def _build(settings: Settings, recipe: Recipe, classes: int) -> nn.Module:
    name, start = settings.model, settings.start
    is_file = start is not None and start != "pretrained" and not Path(start).is_dir()
    folder = None if start is None or start == "pretrained" or is_file else start
    if settings.start_key is not None and not is_file:
        raise ValueError(f"start_key: {settings.start_key!r}, but no checkpoint file to start from")
    given: dict[str, Any] = {}
    if start == "pretrained":
        given = {"pretrained": True}
    elif is_file:
        if not Path(str(start)).is_file():
            raise FileNotFoundError(f"start: {start} is no folder or file, nor 'pretrained'")
        given = {"checkpoint": start, "checkpoint_key": settings.start_key}
    build: Callable[..., nn.Module]
    if folder is not None:
        build, kind = partial(from_pretrained, folder), read_folder_config(folder)["architecture"]
    elif name is None:
        raise ValueError(f"model: none, expected the name of what {start} holds")
    else:
        build, kind = partial(create_model, name, **given), architecture(name)
    options = {"num_classes": classes} | settings.model_args | _rates(kind, recipe)
    try:
        model = at_size(
            partial(build, **options, backend=settings.backend, strict=False), settings.img_size
        )
    except TypeError as error:  # timm's constructors take what they take
        raise ValueError(
            f"model: {name or start} cannot be built with {options} ({error}); another drop_path, "
            "drop or model_args?"
        ) from error
    if folder is not None and name is not None and kind != architecture(name):
        raise ValueError(f"start: {start} holds a {kind}, expected {name}")
    return model


def _rates(name: str, recipe: Recipe) -> dict[str, float]:
    """Keyword arguments for dropout and stochastic depth, where there are any."""
    rates = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    if recipe.drop:
        # In a ViT as the official code has it: positions, projections and MLPs, not the heads
        module = timm.models.model_entrypoint(name).__module__ if timm.is_model(name) else ""
        is_vit = module.rpartition(".")[2] in ("deit", "vision_transformer")
        names = ("pos_drop_rate", "proj_drop_rate") if is_vit else ("drop_rate",)
        rates |= dict.fromkeys(names, recipe.drop)
    return rates


def parameter_groups(recipe: Recipe, model: nn.Module) -> list[dict]:
    """Group a model's parameters as timm does.

    A model names what is not to decay, or, as TinyViT for its biases, a part of such names.

    Returns:
        Groups with their "weight_decay" and, by layer, "lr_scale".
    """
    undecayed = set(getattr(model, "no_weight_decay", set)())
    parts: set[str] = getattr(model, "no_weight_decay_keywords", set)()
    names = [name for name, _ in model.named_parameters()]
    undecayed |= {name for name in names if any(part in name for part in parts)}
    if recipe.layer_decay < 1:
        return param_groups_layer_decay(
            model, recipe.weight_decay, undecayed, layer_decay=recipe.layer_decay
        )
    return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=undecayed)


def model_arguments(settings: Settings, model: nn.Module) -> dict:
    """Collect the keyword arguments that `save_pretrained` needs to describe the model.

    It finds those of a VisionTransformer itself; for others old versions of timm do not tell.

    Raises:
        ValueError: The model could not be saved. It is asked before it is trained.
    """
    given: dict[str, Any] = {}
    if not isinstance(model, VisionTransformer):
        start = settings.start
        was = read_folder_config(start)["model_args"] if start and Path(start).is_dir() else {}
        given = {k: v for k, v in was.items() if k not in TAKEN} | settings.model_args
    describe(model, **given)
    return given


def read_folder_config(folder: str | Path) -> dict:
    """Read "architecture" and "model_args" of a folder of weights.

    Raises:
        ValueError: It is no such folder.
    """
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        return {"architecture": config["architecture"], "model_args": config.get("model_args", {})}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"start: {folder} is no folder of weights ({error!r})") from error
