"""Attention of every head: softmax(scale * q k^T + bias) v, in the layout of the qkv GEMM.

    s = scale * q k^T + bias      p = softmax(s)      o = p v

Backward, with delta = rowsum(do * o), which equals rowsum(dp * p):
    dv = p^T do    dp = do v^T    ds = p * (dp - delta)
    dq = scale * ds k    dk = scale * ds^T q    dbias = sum_batch(ds)
p is recomputed block by block from q, k and the log-sum-exp (LSE) of each row, as in
FlashAttention-2 (Dao, 2023): nothing of size N x L is ever written. The backward is one launch:
some programs own queries and compute dq, some own keys and compute dk and dv. Those of a head run
side by side, so that what they share comes from the cache. No atomics. With a bias, or d = 80, the
backward is PyTorch's and holds the scores in memory.

B samples, H heads, N queries, L keys, d features per head (32, 48, 64 or 80). q (B, N, H, d) and
k, v (B, L, H, d) may be views with any strides, as long as that of d is 1:
`qkv.view(B, N, 3, H, d).unbind(2)` copies nothing. o is a new contiguous (B, N, H, d), which the
projection reads as (B, N, H * d).

Precision: scores, softmax and sums are fp32. p is rounded to v's dtype for the second matmul, ds to
q's dtype. Saved tensors: q, k, v, o and the LSE (B, H, N) in fp32, in units of log2; q, k, v and
the bias where the backward is PyTorch's.

`attention_quantized`, for inference, writes o in FP8 or INT8, and may read q, k and v in FP8.
"""

from .configs import HEAD_DIMS, TRAINED_HEAD_DIMS
from .op import attention
from .quantized import attention_quantized
from .reference import attention_quantized_reference, attention_reference

__all__ = [
    "HEAD_DIMS",
    "TRAINED_HEAD_DIMS",
    "attention",
    "attention_quantized",
    "attention_quantized_reference",
    "attention_reference",
]
