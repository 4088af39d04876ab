"""The second half of a transformer block: x + mlp(layer_norm(x)).

    y = residual + row_scale * layer_scale * (gelu(layer_norm(x) @ W1^T + b1) @ W2^T + b2)

One public operation; the kernels that serve it are a decision made here, by shape and chip. Today
three serve every shape: layer_norm, linear with GELU, linear with the residual. Keeping the hidden
layer on the chip pays at most for D = 192; where it does is for a measurement to say.

x and residual (..., D), W1 (hidden, D), W2 (D, hidden). Dtypes, precision and backward are those of
the parts.
"""

from torch import Tensor

from . import _runtime
from .layer_norm import layer_norm, layer_norm_reference
from .linear import linear, linear_reference


def layer_norm_mlp_reference(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps=1e-6,
    residual=None, layer_scale=None, row_scale=None,
):  # fmt: skip
    y = layer_norm_reference(x, norm_weight, norm_bias, eps)
    hidden = linear_reference(y, fc1_weight, fc1_bias, "gelu")
    return linear_reference(hidden, fc2_weight, fc2_bias, "none", residual, layer_scale, row_scale)


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """LayerNorm -> fc1 -> GELU (exact) -> fc2 [-> layer scale, row scale, + residual].

    x, residual (..., D); norm_weight, norm_bias, layer_scale, fc2_bias (D,); fc1_weight (hidden,
    D), fc1_bias (hidden,), fc2_weight (D, hidden); row_scale (S,) for S samples along x's first
    dimension. Weights in x's dtype (under autocast in any). Returns (..., D) in the promoted dtype
    of the product and the residual; pass `residual=x` for a pre-norm block. `implementation`:
    "auto" | "triton" | "torch". Errors name the part that raised them: `layer_norm` or `linear`.
    """
    # under autocast the product rounds its input anyway: let the LayerNorm write that
    dtype = _runtime.autocast_dtype(x)
    y = layer_norm(x, norm_weight, norm_bias, eps, dtype, implementation)
    hidden = linear(y, fc1_weight, fc1_bias, "gelu", implementation=implementation)
    return linear(
        hidden, fc2_weight, fc2_bias, "none", residual, layer_scale, row_scale, implementation
    )
