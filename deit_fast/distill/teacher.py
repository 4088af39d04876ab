"""Teachers, and the loss by which a student learns from one (DeiT paper, section 4)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deit_fast.checkpoint import load_state, read_checkpoint
from deit_fast.engine import data_config
from deit_fast.kernels import distillation_loss
from deit_fast.models import architecture, create_model
from deit_fast.pretrained import from_pretrained

from .recipe import Recipe

# timm's default tag of this name is another training than the paper's
ALIASES = {"regnety_160": "regnety_160.deit_in1k"}


def load_teacher(
    name_or_folder: str | Path,
    num_classes: int,
    img_size: int | None,
    checkpoint: str | Path | None = None,
    backend: str = "auto",
    checkpoint_key: str | None = None,
) -> nn.Module:
    """Load a frozen model in eval mode, accelerated where it can be.

    Args:
        name_or_folder: A folder from `save_pretrained` (of a run of `deit-fast train`: OUT/model),
            or a name of ours or timm's.
        num_classes: What it must have.
        img_size: Pixels of what the student sees. A teacher of a fixed size is built for that, its
            position embedding resized bicubically without antialiasing. None: its own.
        checkpoint: File with the weights for a name; None takes timm's from the hub.
        backend: See `deit_fast.accelerate`.
        checkpoint_key: Entry of the file, see `deit_fast.checkpoint.read_checkpoint`.

    Raises:
        ValueError: Another number of classes, or a name or checkpoint that does not fit.
        RuntimeError: The hub has no weights, or can't be reached.
        FileNotFoundError: There is no such checkpoint.
    """
    name = ALIASES.get(str(name_or_folder), str(name_or_folder))
    options: dict[str, Any] = {"backend": backend, "strict": False}
    if checkpoint_key is not None and checkpoint is None:
        raise ValueError(f"teacher: checkpoint_key {checkpoint_key!r}, but no checkpoint")
    if Path(name).is_dir():
        if checkpoint is not None:
            raise ValueError(
                f"teacher: the folder {name} has weights, expected no checkpoint as well"
            )
        model = at_size(partial(from_pretrained, name, **options), img_size)
    elif not timm.is_model(architecture(name)):
        raise ValueError(f"teacher: {name!r} is neither a folder nor a name of ours or timm's")
    elif checkpoint is None:
        try:
            model = at_size(partial(create_model, name, pretrained=True, **options), img_size)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"teacher: no pretrained weights for {name} ({_line(error)}); expected a folder, "
                "or a file as its checkpoint"
            ) from error
    else:
        build = partial(create_model, name, num_classes=num_classes, **options)
        model = at_size(build, img_size)
        state = read_checkpoint(checkpoint, checkpoint_key)
        load_state(model, state, f"teacher's checkpoint {checkpoint}")
    if model.num_classes != num_classes:
        raise ValueError(
            f"teacher: {name} has {model.num_classes} classes, expected the data's {num_classes}"
        )
    return model.requires_grad_(False).eval()


def at_size(build: Callable[..., nn.Module], img_size: int | None) -> nn.Module:
    """Return `build()`, or `build(img_size=...)` where that is a model of a fixed other size."""
    model = build()
    fixed = (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size")
    if img_size is None or not fixed or data_config(model)["input_size"][1:] == (img_size,) * 2:
        return model
    return build(img_size=img_size)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class Objective:
    """The loss with labels and a live teacher (DeiT paper, section 4, equations 2 and 3).

    Args:
        recipe: Its weights, temperature and label smoothing.
        distill: "none", "soft" or "hard", see `deit_fast.kernels.distillation_loss`.
        teacher: The model that is asked; None with "none".
        student: The model that learns, for its normalisation.
        class_weights: fp32 (classes,): an image's loss with its true label counts so often, one
            that Mixup made by the shares of its labels. The teacher's term stays as it is.

    Raises:
        ValueError: A teacher without distillation or the reverse, or other channels.
    """

    def __init__(
        self, recipe: Recipe, distill: str, teacher: nn.Module | None, student: nn.Module,
        class_weights: Tensor | None = None,
    ):  # fmt: skip
        weight = recipe.weight(distill)
        if (teacher is None) != (distill == "none"):
            given = "none" if teacher is None else type(teacher).__name__
            raise ValueError(f"teacher: {given}, with distill {distill!r}")
        self.teacher, self.distill, self.weight = teacher, distill, weight
        self.recipe, self.class_weights = recipe, class_weights
        self.scale: tuple[Tensor, Tensor] | None = None  # the student's pixels to the teacher's
        if teacher is not None:
            ours, theirs = data_config(student), data_config(teacher)
            if ours["input_size"][0] != theirs["input_size"][0]:
                raise ValueError(
                    f"teacher: {theirs['input_size'][0]} channels, expected the student's "
                    f"{ours['input_size'][0]}"
                )
            if (ours["mean"], ours["std"]) != (theirs["mean"], theirs["std"]):
                mean, std, mean_t, std_t = (
                    torch.tensor(config[key]).view(-1, 1, 1)
                    for config in (ours, theirs)
                    for key in ("mean", "std")
                )
                self.scale = std / std_t, (mean - mean_t) / std_t

    def __call__(
        self, output: Tensor | tuple[Tensor, Tensor], images: Tensor, target: Tensor
    ) -> Tensor:
        """Return the loss, a scalar in fp32.

        Args:
            output: (class logits, distillation logits), each (B, C), of a model with a distillation
                token, which then learns from the teacher; or the logits of a class token, which
                learns from both ("usual distillation", Table 3).
            images: (B, channels, H, W), normalised for the student. The teacher gets them
                normalised for itself.
            target: int64 (B,), smoothed here by the recipe's label_smoothing; or probabilities
                (B, C), which Mixup has smoothed.
        """
        class_logits, dist_logits = output if isinstance(output, tuple) else (output, output)
        soft = target.is_floating_point()
        taught = self.distill != "none"
        labelled = None
        if self.class_weights is not None:
            labelled = self._weighted(class_logits, target)
            if not taught:
                return labelled
        loss = distillation_loss(
            class_logits,
            dist_logits if taught else None,
            target,
            self.teach(images) if taught else None,
            self.distill,
            alpha=self.weight if labelled is None else 1.0,  # 1: the teacher's term alone
            temperature=self.recipe.temperature,
            label_smoothing=0.0 if soft else self.recipe.label_smoothing,
        )
        return loss if labelled is None else (1 - self.weight) * labelled + self.weight * loss

    def _weighted(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean cross entropy with labels, each image's times its weight.

        A weight for each class inside the cross entropy, as PyTorch's, would apply to the smoothed
        part of a label too: a rare class could outweigh the label itself.
        """
        assert self.class_weights is not None
        smoothing, classes = self.recipe.label_smoothing, logits.shape[1]
        weights = self.class_weights.to(logits.device)
        self.class_weights = weights = F.pad(weights, (0, classes - len(weights)))
        if target.is_floating_point():
            losses = F.cross_entropy(logits.float(), target.float(), reduction="none")
            shares = (target.float() - smoothing / classes) / (1 - smoothing)  # before smoothing
            return (shares @ weights * losses).mean()
        losses = F.cross_entropy(
            logits.float(), target, reduction="none", label_smoothing=smoothing
        )  # fmt: skip
        return (weights[target] * losses).mean()

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (B, C) for images that are normalised for the student."""
        assert self.teacher is not None
        if self.scale is not None:
            factor, shift = (t.to(images) for t in self.scale)
            self.scale = factor, shift
            images = images * factor + shift
        return self.teacher(images)
