"""Multi-head self-attention: qkv product, attention out of its layout, projection."""

import timm.layers

from deit_fast import kernels
from deit_fast.kernels.attention import HEAD_DIMS

from ._base import Fast, attention_scale, is_identity, weights, why_not_dropouts
from ._parts import linear, normalized_linear, residual_linear


class Attention(Fast, timm.layers.Attention):
    """timm's Attention without q/k norm and gate: (B, N, D) -> (B, N, D_out).

    With active dropout, and a mask or causal attention given at run time, timm's own forward runs.
    """

    timm_class = timm.layers.Attention
    linears = ("qkv", "proj")
    calls_linears = True

    @classmethod
    def why_not(cls, module):
        if not is_identity(module.q_norm) or not is_identity(module.k_norm):
            return "normalises q and k"
        if not is_identity(getattr(module, "norm", None)):
            return "has a norm before the projection"
        if getattr(module, "gate", None) is not None:
            return "has a gate"
        if module.head_dim not in HEAD_DIMS:
            return f"has head dimension {module.head_dim}, the kernel takes {HEAD_DIMS}"
        return why_not_dropouts(module, "attn_drop", "proj_drop")

    def forward(self, x, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal or self.plan(x).unfused:
            return self.unfused(x, attn_mask=attn_mask, is_causal=is_causal)
        o = self._attend_packed(linear(x, self.qkv, self.backend))
        return linear(o, self.proj, self.backend)

    def in_parts(self, x, norm, layer_scale, drop_path):
        """`branch` around Linears that have to be called: x and the attention half of it."""
        o = self._attend_packed(normalized_linear(x, norm, self.qkv, self.backend))
        return residual_linear(o, self.proj, x, layer_scale, drop_path, self.backend)

    def branch(self, x, norm, first=None, row_stats=None, **epilogue):
        """The attention half of a Block: `norm`, a LayerNorm module, comes first and the rest is
        the projection's epilogue. With `first`, the first tokens (B, T, D) of x, only they ask, and
        all answer: (B, T, D_out). `row_stats` are those of x's rows, if they are known."""
        use = {"implementation": self.backend}
        fold = {"row_stats": row_stats, **use}
        norm_weight, norm_bias, eps = norm.operands
        weight, bias = weights(self.qkv)
        if first is None:
            return kernels.layer_norm_attention(
                x, norm_weight, norm_bias, weight, bias, *weights(self.proj), self.num_heads, eps,
                attention_scale(self, self.head_dim), **epilogue, **fold,
            )  # fmt: skip
        rows = self.num_heads * self.head_dim
        q_bias, kv_bias = (None, None) if bias is None else (bias[:rows], bias[rows:])
        q = kernels.layer_norm_linear(
            first, norm_weight, norm_bias, weight[:rows], q_bias, eps, **use
        )
        kv = kernels.layer_norm_linear(
            x, norm_weight, norm_bias, weight[rows:], kv_bias, eps, **fold
        )
        q = q.unflatten(2, (self.num_heads, -1))
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).unbind(2)
        return kernels.linear(self._attend(q, k, v), *weights(self.proj), **epilogue, **use)

    def _attend_packed(self, qkv):
        return self._attend(*qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2))

    def _attend(self, q, k, v):
        return kernels.attention(
            q, k, v, attention_scale(self, self.head_dim), implementation=self.backend
        ).flatten(2)
