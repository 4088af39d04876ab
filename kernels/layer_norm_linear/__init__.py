"""LayerNorm followed by a linear layer: in the GEMM's prologue, folded into its weight, or apart.

    y = act(LN(x) @ W^T + b)   with   LN(x) = (x - mean) * rstd * g + h

g and h are LayerNorm's weight and bias. There are three ways to compute it.

"prologue": one kernel, for few rows. Each program makes mean and rstd of its rows in a first pass
over them, or from row statistics. Its loop over K then loads x, normalises it in fp32, rounds it to
x's dtype and multiplies it with W. x comes from L2 the second time; no weight is copied. Every tile
of y normalises its rows of x again, so that this costs time in proportion to M N K, where the
launch that it saves costs the same for any shape: `configs.LARGEST_PROLOGUE`.

"fold": three kernels, or two, for many rows. The normalisation is folded into the GEMM:

    y  = act(rstd * u * (x @ W'^T - mean * s) + b')
    W' = round(W * g / u)      s = rowsum(W')      b' = b + W @ h

The GEMM reads x itself, its epilogue does the rest, and the normalised x is never written. W' and s
are computed at each call, so that a change of the weights is seen: 4 N K bytes, where a LayerNorm
moves 4 M K. The unit u, the power of two below the largest of |g|, keeps W' of a small g out of
fp16's subnormal numbers. s sums the *rounded* W', and the mean is subtracted from the fp32
accumulator. x is rounded once instead of twice, so the error is below that of the other ways, also
where channels or means are far from zero (docs/performance.md).

"separate": the two operations one after the other. With gradients, in fp32, under autocast with an
fp32 x, and where M is too large for the prologue and small beside N.

mean and rstd come from the row statistics that `linear(..., return_row_stats=True)` returns beside
x, or are computed from x. M rows, K -> N features: x (M, K), W (N, K), g and h (K,), b (N,); row
statistics (P, 2, M) in fp32: mean and sum of squared differences from it, of each of P equal parts
of a row. "prologue" and "fold" are for half precision and inference only.
"""

from .configs import uses_row_stats
from .op import IMPLEMENTATIONS, layer_norm_linear
from .reference import layer_norm_linear_reference

__all__ = [
    "IMPLEMENTATIONS",
    "layer_norm_linear",
    "layer_norm_linear_reference",
    "uses_row_stats",
]
