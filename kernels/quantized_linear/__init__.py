"""Linear layer with quantized operands (FP8 or INT8), and a quantized result for the next one.

    z = (xq @ wq^T) * xs * ws + b            xq, xs and wq, ws: values and scales, see `quantize`
    y = residual + row_scale * layer_scale * a,      a = z or gelu(z)
    or y = quantize(a), with per-group scales or with a given per-tensor scale

M rows, K input features, N output features, S samples.

The weight (N, K) has per-row scales, which belong to columns of the result: ws (1, N). The scales
of x (M, K) are per-row, xs (1, M), or per-tensor, (1, 1); these are applied in the epilogue, as ws
is. Or they are per-group, (P, M), for P equal groups of each row's features, and multiply each
group's share of the sum:

    z = sum_p xs[p] * (xq[:, p] @ wq[:, p]^T) * ws + b

LayerNorm holds whole rows and gives them one scale. A tile of GELU's result has 64 columns of a
row, and a program of attention one head. So the result of this operation has a scale for each group
of 64 columns, unless it is given a static one.

Precision: INT8 GEMMs are exact in int32. FP8 GEMMs accumulate on the tensor cores: in fp32 on
sm_89, with the fewer bits of its fp8 instruction on sm_90. From there on everything is fp32 until y
is rounded, once. GELU as in `linear`. Inference only.
"""

from .configs import GROUP_SIZE
from .op import SHORT_SUMS, quantized_linear
from .reference import quantized_linear_reference

__all__ = ["GROUP_SIZE", "SHORT_SUMS", "quantized_linear", "quantized_linear_reference"]
