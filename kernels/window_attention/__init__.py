"""Attention inside square windows of a feature map, with a learned bias per offset (TinyViT).

    s[n, m] = scale * q[n] . k[m] + biases[|dy|, |dx|]      (dy, dx): from token n to token m
    p = softmax(s)      o = p v                             for each window and head

Backward, with delta = rowsum(do * o), which equals rowsum(dp * p):
    dv = p^T do    dp = do v^T    ds = p * (dp - delta)
    dq = scale * ds k    dk = scale * ds^T q    dbiases[i, j] = sum of ds where |dy| = i, |dx| = j

B samples, a map of Y x X tokens in windows of W x W (L = W^2 tokens; Y and X multiples of W), H
heads of d = 32 features. qkv (B, Y, X, H, 3, d): q, k and v of a head lie side by side, as
TinyViT's qkv GEMM writes them. biases (H, W^2) are row-major in (|dy|, |dx|). o is (B, Y, X, H, d).
Windows are index arithmetic: no map is partitioned or merged in memory. Nor is there a table of
L x L biases: each score looks up its bias by its offset.

Precision: scores, softmax and sums are fp32. p is rounded to v's dtype for the second matmul, ds to
q's dtype. Saved tensors: qkv, biases, o and the log-sum-exp (LSE) of each row, (B, Y, X, H) in
fp32, in units of log2. Backward recomputes p from them, block by block. The gradient of the biases
has kernels of its own: a block of ds is summed over windows in registers, then over blocks and
offsets; no atomics.

Source: TinyViT (Wu et al., 2022), section 3.3; the biases are LeViT's (Graham et al., 2021).
"""

from .configs import HEAD_DIM
from .op import window_attention
from .reference import offsets, window_attention_reference

__all__ = ["HEAD_DIM", "offsets", "window_attention", "window_attention_reference"]
