"""The second half of a transformer block: x + mlp(layer_norm(x)).

    y = residual + row_scale * layer_scale * (gelu(layer_norm(x) @ W1^T + b1) @ W2^T + b2)

There are two ways to compute it. In parts: `layer_norm_linear` with GELU, then `linear` with the
residual. Fused, for D = 192 in half precision and inference: one kernel in which the hidden layer
never leaves the chip. That moves 156 MB less for DeiT-Ti at batch 256, at the price of matmuls that
wait for each other. By rule every shape is served in parts; a tuned table may say otherwise, and
`implementation="fused"` insists.

Shapes: M rows; x and residual (..., D), W1 (hidden, D), W2 (D, hidden).

Precision: in the fused kernel the normalised x and the hidden layer are rounded to x's dtype; sums
are fp32. In training z, a and LN(x) have the GEMMs' dtype; under autocast x stays fp32.

Training is one node of the autograd graph, with z = LN(x) @ W1^T + b1, a = gelu(z), and x as the
residual or none:

    dy'  = dy * layer_scale * row_scale             db2 = sum_rows(dy')    dW2 = dy'^T @ a
    dz   = (dy' @ W2) * gelu'(z)                    db1 = sum_rows(dz)     dW1 = dz^T @ LN(x)
    dx   = dLN(dz @ W1) + dy                        both in LayerNorm's backward kernel

gelu' is in the epilogue of its matmul, which also recomputes a and sums the columns of dz.

Saved for backward: x, z, the weights; with a layer_scale what it scales. LN(x) and a are
recomputed, unless recompute=False asks to save them too, M (D + hidden) elements.
"""

from .op import IMPLEMENTATIONS, layer_norm_mlp
from .reference import layer_norm_mlp_reference

__all__ = ["IMPLEMENTATIONS", "layer_norm_mlp", "layer_norm_mlp_reference"]
