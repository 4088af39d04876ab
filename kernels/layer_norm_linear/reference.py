"""The plain PyTorch reference of `layer_norm_linear`: the definition of right."""

from torch import Tensor

from ..layer_norm import layer_norm_reference
from ..linear import linear_reference


def layer_norm_linear_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None,
    eps: float = 1e-6, activation: str = "none",
) -> Tensor:  # fmt: skip
    """`layer_norm_linear` in PyTorch's operations: the definition of right."""
    y = layer_norm_reference(x, norm_weight, norm_bias, eps)
    return linear_reference(y, weight, bias, activation)
