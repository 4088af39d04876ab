"""Images on their way into an engine: what kinds there are, and host memory that a GPU copies from.

The copy engine of a GPU reads pinned memory alone. Images in other memory are copied into a pinned
buffer first, in their own dtype, and cast on the GPU: the caller's memory is free at once, and the
caller waits for no copy.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(images: Any) -> Tensor:
    """Images as a tensor.

    Args:
        images: a tensor, or a numpy array, whose memory the tensor shares if it can be written to.

    Raises:
        TypeError: for anything else, and for an array of a dtype that PyTorch has not.
    """
    if isinstance(images, Tensor):
        return images
    if not isinstance(images, np.ndarray):
        raise TypeError(
            f"images: {type(images).__name__}, expected a torch.Tensor or a numpy array"
        )
    if not images.flags.writeable or any(stride < 0 for stride in images.strides):
        images = images.copy()  # PyTorch has no such tensors
    try:
        return torch.from_numpy(images)
    except TypeError:
        raise TypeError(f"images: dtype {images.dtype}, expected floating point or uint8") from None


def kind_of(images: Tensor, image_shape: tuple[int, ...], device: torch.device) -> str:
    """The kind of images, "float" or "uint8".

    Args:
        images: float (B, C, H, W) or uint8 (B, H, W, C).
        image_shape: (C, H, W), in pixels.
        device: where they may lie, beside the host.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or device.
    """
    channels, height, width = image_shape
    shape: tuple[int, ...] = image_shape
    if images.dtype == torch.uint8:
        kind, shape = "uint8", (height, width, channels)
    elif images.is_floating_point():
        kind = "float"
    else:
        raise TypeError(f"images: dtype {images.dtype}, expected floating point or uint8")
    if images.dim() != 4 or tuple(images.shape[1:]) != shape:
        expected = ", ".join(map(str, shape))
        got = tuple(images.shape)
        raise ValueError(f"images: shape {got}, expected (B, {expected}) for {images.dtype}")
    if not on_host(images) and images.device != device:
        raise ValueError(f"images: on {images.device}, expected {device} or the host")
    return kind


def on_host(images: Tensor) -> bool:
    """Whether images are in host memory."""
    return images.device.type == "cpu"


def is_pinned(images: Tensor) -> bool:
    """Whether images in host memory are in pinned memory, from which a copy needs no host."""
    return images.is_pinned()


def pinned_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Pinned host memory, not initialised."""
    with torch.inference_mode(False):  # whatever mode the caller is in
        return torch.empty(shape, dtype=dtype, pin_memory=True)


def stage(buffer: Tensor, images: Tensor) -> None:
    """Copy images into a pinned buffer, on the host and at once."""
    buffer.copy_(images)
