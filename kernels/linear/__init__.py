"""Linear layer with all that follows it in a transformer block as its epilogue.

    z = x @ W^T + b
    a = z   or   gelu(z) = z * (1 + erf(z / sqrt(2))) / 2
    y = a * layer_scale * row_scale [+ residual]

Backward, with dz = dy * layer_scale * row_scale * gelu'(z) and gelu'(z) = Phi(z) + z phi(z):

    dx = dz @ W      dW = dz^T @ x      db = sum_rows(dz)
    dresidual = dy   dlayer_scale = sum_rows(dy * row_scale * a)

One kernel over dy computes dz and sums its columns, one partial sum for each block of rows. The two
GEMMs of backward have no epilogue and are torch.mm's.

Shapes: M rows, K input features, N output features, S samples of M / S rows each. x (M, K), W
(N, K), b and layer_scale (N,), row_scale (S,), residual and y (M, N). row_scale is the drop-path
(stochastic depth) mask: 0 or 1 / keep probability.

Precision: GEMMs accumulate in fp32. The epilogue is fp32 and rounds once, to y's dtype: the
residual's where there is one (autocast keeps the residual stream in fp32), x's otherwise. fp32
GEMMs are IEEE fp32, never TF32 (for the two of backward PyTorch's setting decides). GELU is erf in
fp32, and within 3e-5 of it in half precision.

Saved for backward: x, W, b, layer_scale, row_scale and, with GELU or a layer_scale, z in x's dtype.

In inference the epilogue may also write the row statistics of the rounded y, (N / 64, 2, M) in
fp32: the mean of each 64 columns, and the sum of squared differences from it. `layer_norm_linear`,
which shares the kernel, computes its LayerNorm from them.
"""

from .backward import linear_gelu_backward
from .op import ACTIVATIONS, linear, linear_backward, worth_row_stats
from .reference import linear_reference

__all__ = [
    "ACTIVATIONS",
    "linear",
    "linear_backward",
    "linear_gelu_backward",
    "linear_reference",
    "worth_row_stats",
]
