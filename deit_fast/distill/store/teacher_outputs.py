"""What is asked of the teacher of a soft-label store, and who it is."""

import numpy as np
import torch
from torch import nn

from deit_fast.batch_inference import digest
from deit_fast.engine import data_config

from ..student import AMP


def teacher_identity(model: nn.Module) -> dict:
    """Describe a teacher by its architecture and a digest of its weights."""
    cfg: dict = model.pretrained_cfg  # type: ignore[assignment]  # timm gives every model one
    return {"architecture": cfg["architecture"], "weights": digest(model)}


def view_config(model: nn.Module, img_size: int | None) -> dict:
    """Choose timm's data configuration for a teacher's views: square, of 1 or 3 channels.

    Args:
        model: The teacher.
        img_size: Pixels of a side; None: its own.

    Raises:
        ValueError: The teacher has other channels, or is not square.
    """
    config = data_config(model)
    channels, *size = config["input_size"]
    size = size if img_size is None else [img_size] * 2
    if channels not in (1, 3):
        raise ValueError(f"teacher: {channels} channels, expected 1 or 3")
    if size[0] != size[1]:
        raise ValueError(f"teacher: images of {size[0]} x {size[1]}, expected an img_size")
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            raise ValueError(
                f"teacher: {name} {config[name]} in its pretrained_cfg, expected one a channel: "
                f"{channels}"
            )
    return config | {"input_size": (channels, *size)}


def image_mode(config: dict) -> str:
    """PIL's mode for the channels of a `view_config`."""
    return {1: "L", 3: "RGB"}[config["input_size"][0]]


def top_k_probabilities(
    model: nn.Module, images: torch.Tensor, amp: str, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ask the teacher, in one forward pass.

    Args:
        model: The teacher, in eval mode.
        images: Views (B, channels, H, W) fp32, on any device.
        amp: "none", "bf16" or "fp16".
        k: How many classes to return.

    Returns:
        Classes uint16 and probabilities fp16, both (B, k), descending.

    Raises:
        FloatingPointError: A probability is not finite.
    """
    images = images.to(next(model.parameters()).device, non_blocking=True)
    dtype = AMP[amp]
    with (
        torch.inference_mode(),
        torch.autocast(images.device.type, dtype, enabled=dtype is not None),
    ):
        found = model(images).float().softmax(1).topk(k)
    probs, classes = found.values.cpu().numpy(), found.indices.cpu().numpy()
    if not np.isfinite(probs).all():
        raise FloatingPointError("teacher: its output is not finite, expected another amp")
    return classes.astype(np.uint16), probs.astype(np.float16)
