"""Talking-heads attention: the scores of all heads are mixed before and after the softmax.

    s_h = scale * q_h k_h^T            t_g = sum_h Wl[g, h] s_h + bl[g]       p_g = softmax(t_g)
    a_f = sum_g Ww[f, g] p_g + bw[f]   o_f = a_f v_f                          f, g, h: heads

bl is the same for all keys of a row, so the softmax cancels it and its gradient is 0. Backward:
    dv_f = a_f^T do_f          da_f = do_f v_f^T               dbw[f] = sum(da_f)
    dp_g = sum_f Ww[f, g] da_f                                 dWw[f, g] = sum(da_f * p_g)
    dt_g = p_g * (dp_g - delta_g)   delta_g = rowsum(p_g dp_g) dWl[g, h] = sum(dt_g * s_h)
    ds_h = sum_g Wl[g, h] dt_g   dq_h = scale * ds_h k_h       dk_h = scale * ds_h^T q_h
dbw needs no scores: it is the dot product of do's sum over queries and v's sum over keys.

A program holds a tile of all heads, (H, queries, keys), and goes over the keys twice: for the
maximum and the sum of each row, which depend on all heads, then for the result. So nothing of size
N x N is ever written, and the scores are computed twice. Backward recomputes them from the
log-sum-exp (LSE) of the rows: one launch goes over the keys for delta and dWw, then for dq and dWl;
one goes over the queries for dk and dv. dWl and dWw are partial sums of each program, no atomics.

Mixing is a matmul too, on tensor cores: the weights times the tile as a matrix with one row per
head. Tensor cores need at least 16 rows. With 8 heads, each half of a head's tile is a row, and the
weights become W (x) I, 16 x 16, with zeros between different halves. NaN times such a zero is NaN,
and so is an fp16 score that overflowed. So one NaN in q may reach other queries of its sample, as a
NaN in k or v does in any attention.

B samples, H heads (to 16), N tokens, d features per head (32, or 48 as in CaiT). qkv
(B, N, 3, H, d), contiguous, is the layout of the qkv GEMM; o (B, N, H, d) that of the projection.

Precision: sums and softmax are fp32. Operands of matmuls are rounded to qkv's dtype first, as
PyTorch rounds them: s, p and a, and in backward da, dt and ds. Saved tensors: qkv, the weights and
the LSE (B, H, N) in fp32, in units of log2.

Source: Touvron et al. 2021, Going deeper with Image Transformers; Shazeer et al. 2020,
Talking-Heads Attention.
"""

from .configs import why_not
from .op import talking_heads_attention
from .reference import talking_heads_attention_reference

__all__ = ["talking_heads_attention", "talking_heads_attention_reference", "why_not"]
