"""The plain PyTorch reference of `layer_norm_mlp`: the definition of right."""

from torch import Tensor

from ..layer_norm import layer_norm_reference
from ..linear import linear_reference


def layer_norm_mlp_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor,
    fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float = 1e-6,
    residual: Tensor | None = None, layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm, fc1, GELU, fc2, layer scale, drop path and residual in PyTorch.

    The arguments are those of `layer_norm_mlp`.
    """
    y = layer_norm_reference(x, norm_weight, norm_bias, eps)
    hidden = linear_reference(y, fc1_weight, fc1_bias, "gelu")
    return linear_reference(hidden, fc2_weight, fc2_bias, "none", residual, layer_scale, row_scale)
