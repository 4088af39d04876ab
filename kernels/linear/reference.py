"""The plain PyTorch reference of `linear`: the definition of right."""

from torch import Tensor
from torch.nn import functional as F


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none",
    residual: Tensor | None = None, layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`residual + row_scale * layer_scale * activation(x @ weight.T + bias)` in PyTorch.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
        activation: "none" or "gelu" (erf).
        residual: (..., N).
        layer_scale: (N,).
        row_scale: (S,), for S samples along x's first dimension.

    Returns:
        (..., N), in the dtype that PyTorch promotes to.
    """
    y = F.linear(x, weight, bias)
    if activation == "gelu":
        y = F.gelu(y)
    if layer_scale is not None:
        y = y * layer_scale
    if row_scale is not None:
        y = y * row_scale.view(-1, *(1,) * (y.dim() - 1))
    return y if residual is None else residual + y
