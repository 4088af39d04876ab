"""Recipes: how a model is trained, as data. `recipes/*.json` are the paper's."""

import json
import math
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from deit_fast._names import DISTILLATIONS

NAMES = ("deit", "deit-384", "transfer", "vit", "tinyvit-22k", "tinyvit-22k-1k")
CROPS = ("resize", "pad")
INTERPOLATIONS = ("bicubic", "bilinear", "random")
BALANCES = ("none", "sampler", "loss")
VIEW_SETTINGS = (  # those that decide the views of a soft-label store
    "crop", "scale", "hflip", "color_jitter", "auto_augment", "interpolation", "erasing", "mixup",
    "cutmix", "mixup_prob", "mixup_switch_prob",
)  # fmt: skip


def _setting(
    help: str,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    default: Any = MISSING,
) -> Any:
    """Declare a field of `Recipe` with its help text and its limits; `above` is exclusive.

    `default` is for what came later: it changes nothing, and files without the setting have it.
    """
    limits = {"least": least, "most": most, "above": above, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Recipe:
    """Every setting that changes what is learnt; each is an option of `deit-fast train`.

    Raises:
        ValueError: A value makes no sense; the message names the setting.
    """

    epochs: int = _setting("passes over the training data", least=1)
    batch: int = _setting("images an update, over all ranks and --accum", least=1)
    opt: str = _setting("optimiser, a name of timm's (adamw, sgd, ...)")
    lr: float = _setting("learning rate for a batch of lr-batch images", above=0)
    lr_batch: int = _setting("lr scales with batch / lr-batch; 0: it is taken as it is", least=0)
    weight_decay: float = _setting("of matrices; not of biases and norms", least=0)
    momentum: float = _setting("of SGD", least=0, most=1)
    opt_eps: float = _setting("epsilon of AdamW", above=0)
    clip_grad: float = _setting("largest norm of the gradient; 0: not clipped", least=0)
    layer_decay: float = _setting("factor on lr from each layer to the one before", above=0, most=1)
    freeze_bn: bool = _setting("batch norm keeps the statistics it starts with")
    warmup_epochs: float = _setting("of linearly growing lr", least=0)
    warmup_lr: float = _setting("where warm-up starts", least=0)
    min_lr: float = _setting("where the cosine ends", least=0)
    sched_on_updates: bool = _setting("lr changes with every update, not every epoch")
    label_smoothing: float = _setting("of true labels, not of the teacher's", least=0, most=1)
    drop: float = _setting("dropout", least=0, most=1)
    drop_path: float = _setting("stochastic depth, of the last block", least=0, most=1)
    repeated_aug: int = _setting("times an image comes in a row; 1: once", least=1)
    crop: str = _setting("resize: random resized; pad: 4 pixels around, unscaled", choices=CROPS)
    scale: float = _setting("least share of the area that a resized crop keeps", above=0, most=1)
    hflip: float = _setting("probability of mirroring", least=0, most=1)
    color_jitter: float = _setting("where there is no auto-augment", least=0)
    auto_augment: str = _setting("timm's policy, such as rand-m9-mstd0.5-inc1, original; none")
    interpolation: str = _setting("of resizing", choices=INTERPOLATIONS)
    crop_pct: float = _setting("of the resized side that evaluation keeps", above=0, most=1)
    mixup: float = _setting("Mixup's alpha; 0: none", least=0)
    cutmix: float = _setting("CutMix's alpha; 0: none", least=0)
    mixup_prob: float = _setting("probability that a batch is mixed", least=0, most=1)
    mixup_switch_prob: float = _setting("of CutMix where both are on", least=0, most=1)
    erasing: float = _setting("probability of random erasing", least=0, most=1)
    ema: float = _setting("decay of the averaged weights; 0: none", least=0, most=1)
    temperature: float = _setting("tau of soft distillation", above=0)
    soft_weight: float = _setting("the teacher's weight in soft distillation", least=0, most=1)
    hard_weight: float = _setting("the teacher's weight in hard distillation", least=0, most=1)
    freeze: int = _setting(
        "so many blocks from the input are not trained; -1: the heads alone are",
        least=-1,
        default=0,
    )
    balance: str = _setting(
        "rare classes: come more often (sampler), weigh more in the loss (loss), or none",
        choices=BALANCES, default="none",
    )  # fmt: skip

    def __post_init__(self):
        from timm.optim import list_optimizers  # takes seconds, and the options need none

        for setting in fields(self):
            _check(setting, getattr(self, setting.name))
        if self.opt not in list_optimizers():
            raise ValueError(f"opt: {self.opt!r}, expected one of timm's: adamw, sgd, lamb, ...")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs}, expected at most the {self.epochs} epochs; "
                "give --warmup-epochs, or more --epochs"
            )
        if self.min_lr > self.peak_lr:
            raise ValueError(
                f"min_lr: {self.min_lr:g}, expected at most the peak lr {self.peak_lr:g}"
                f"{self._of_batch}; give a lower --min-lr, or a higher --lr"
            )
        if self.balance == "loss" and self.label_smoothing == 1:
            raise ValueError(
                "label_smoothing: 1 with balance 'loss', expected less: it leaves no label to weigh"
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: scaled with the batch (Table 9)."""
        return self.lr * self.batch / self.lr_batch if self.lr_batch else self.lr

    @property
    def _of_batch(self) -> str:
        """How the peak lr comes from the batch, for an error."""
        if not self.lr_batch:
            return ""
        return f" (lr {self.lr:g} x batch {self.batch} / lr_batch {self.lr_batch})"

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix can happen."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mixup_prob > 0

    def weight(self, distill: str) -> float:
        """Return the weight of the teacher's term in the loss.

        Args:
            distill: "none", "soft" or "hard".

        Raises:
            ValueError: For any other.
        """
        weights = {"none": 0.0, "soft": self.soft_weight, "hard": self.hard_weight}
        if distill not in weights:
            raise ValueError(f"distill: {distill!r}, expected one of {DISTILLATIONS}")
        return weights[distill]


def load(name_or_path: str | Path, **settings: Any) -> Recipe:
    """Load a recipe, with `settings` over it.

    Args:
        name_or_path: One of `NAMES`, or a JSON file with the same keys. A file may say "base": the
            recipe whose other settings it takes.
        **settings: Fields of `Recipe`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file or a setting is wrong; the message names the file and the key.
    """
    return replace(_read(name_or_path), **settings)


def _read(name_or_path: str | Path, above: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and those it is based on; `above` has the ones that led here."""
    path = Path(name_or_path)
    if str(name_or_path) in NAMES:
        path = Path(str(files(__package__)), "recipes", f"{name_or_path}.json")
    elif not path.is_file():
        raise FileNotFoundError(f"recipe: {path} is no file, nor one of {', '.join(NAMES)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"recipe {path}: is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path}: holds a {type(content).__name__}, expected an object")
    content.pop("about", None)
    base = content.pop("base", None)
    known = {setting.name for setting in fields(Recipe)}
    if unknown := sorted(content.keys() - known):
        raise ValueError(f"recipe {path}: unknown {', '.join(unknown)}")
    try:
        if base is not None:
            if str(path) in above:
                raise ValueError("is based on itself")
            if base not in NAMES:
                base = path.parent / base
            return replace(_read(base, (*above, str(path))), **content)
        needed = {setting.name for setting in fields(Recipe) if setting.default is MISSING}
        if missing := sorted(needed - content.keys()):
            raise ValueError(f"misses {', '.join(missing)}")
        return Recipe(**content)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"recipe {path}: {error}") from error


def _check(setting: Field, value: Any) -> None:
    name, limits = setting.name, setting.metadata
    if setting.type is float and type(value) is int:
        value = float(value)
    kind = cast(type, setting.type)  # no annotation of `Recipe` is a string
    if type(value) is not kind or value != value or value in (math.inf, -math.inf):
        raise ValueError(f"{name}: {value!r}, expected a {kind.__name__}")
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"{name}: {value!r}, expected one of {', '.join(limits['choices'])}")
    if limits["least"] is not None and value < limits["least"]:
        raise ValueError(f"{name}: {value}, expected {limits['least']} or more")
    if limits["above"] is not None and value <= limits["above"]:
        raise ValueError(f"{name}: {value}, expected it above {limits['above']}")
    if limits["most"] is not None and value > limits["most"]:
        raise ValueError(f"{name}: {value}, expected at most {limits['most']}")
