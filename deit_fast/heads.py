"""Which heads of a distilled model make its prediction at inference."""

import warnings

from torch import nn

from . import calibration
from .kernels.classifier import FUSIONS
from .layers import VisionTransformerDistilled


def set_heads(model: nn.Module, heads: str) -> None:
    """Choose what a distilled model returns at inference (DeiT paper, section 4 and Table 3).

    Args:
        model: An accelerated model.
        heads: "joint" (the mean of both heads' logits, as timm), "joint_softmax" (the sum of their
            softmax outputs, as the paper), "class" or "distill". A calibration is of one choice,
            and left out, with a warning, for another.

    Raises:
        ValueError: For another name, and for a model with one head unless `heads` is "joint".
    """
    if heads not in FUSIONS:
        raise ValueError(f"heads: {heads!r}, expected one of {FUSIONS}")
    if isinstance(model, VisionTransformerDistilled):
        if heads != model.heads and calibration.of(model) is not None:
            calibration.attach(model, None)
            warnings.warn(
                f"heads: {heads!r}, but the model's calibration is of {model.heads!r}: left out",
                stacklevel=2,
            )
        model.heads = heads
    elif heads != "joint":
        raise ValueError(f"heads: {heads!r}, but {type(model).__name__} has one head")
