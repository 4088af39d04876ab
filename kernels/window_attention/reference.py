"""Window attention in plain PyTorch: the definition of right."""

import torch
from torch import Tensor

from .. import _dispatch


def offsets(window: int, device: torch.device | None = None) -> Tensor:
    """Index of the bias that each pair of tokens of a window takes.

    Args:
        window: Side of a window, W tokens.
        device: Of the result.

    Returns:
        (W^2, W^2) int64, from 0 to W^2 - 1.
    """
    at = torch.arange(window, device=device)
    apart = (at[:, None] - at).abs()
    index = apart[:, None, :, None] * window + apart[None, :, None, :]
    return index.reshape(window**2, window**2)


def split_windows(qkv: Tensor, window: int) -> tuple[Tensor, ...]:
    """q, k and v of a map (B, Y, X, H, 3, d), each (B * windows, H, W^2, d)."""
    B, Y, X, H, _, d = qkv.shape
    cut = qkv.reshape(B, Y // window, window, X // window, window, H, 3, d)
    return cut.permute(6, 0, 1, 3, 5, 2, 4, 7).reshape(3, -1, H, window**2, d).unbind()


def merge_windows(o: Tensor, shape: torch.Size, window: int) -> Tensor:
    """The map (B, Y, X, H, d) of windows (B * windows, H, W^2, d); `shape` is that of qkv."""
    B, Y, X, H, _, d = shape
    cut = o.reshape(B, Y // window, X // window, H, window, window, d)
    return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, Y, X, H, d)


def window_attention_reference(
    qkv: Tensor, biases: Tensor, window: int, scale: float | None = None
) -> Tensor:
    """Windows cut out, PyTorch's scaled_dot_product_attention in each, and merged again.

    Arguments and result as those of `window_attention`.
    """
    q, k, v = split_windows(qkv, window)
    bias = biases[:, offsets(window, biases.device)].to(q.dtype)
    return merge_windows(_dispatch.sdpa(q, k, v, bias, scale), qkv.shape, window)
