"""Multi-head self-attention: qkv GEMM, attention on its output layout, projection GEMM."""

import timm.layers

from deit_fast import kernels
from deit_fast.kernels.attention import HEAD_DIMS

from ._base import Fast, attention_scale, is_identity, weights, why_not_dropouts
from ._branch import layer_norm_linear, linear, residual_linear


class Attention(Fast, timm.layers.Attention):
    """timm's Attention without q/k norm and gate: (B, N, D) -> (B, N, D_out).

    With active dropout, and a mask or causal attention given at run time, timm's own forward runs.
    """

    timm_class = timm.layers.Attention
    linears = ("qkv", "proj")
    fuses_around_linears = True

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

    def branch(self, x, norm, row_stats=None, **rest):
        """The attention branch of a Block, LayerNorm included.

        Args:
            x: (B, N, D), the residual stream.
            norm: the `deit_fast.layers.LayerNorm` in front.
            row_stats: the row statistics of x, if they are known.
            rest: the epilogue of the projection and the number of queries T, if not all tokens are
                queries, as `deit_fast.kernels.layer_norm_attention` takes them.

        Returns:
            (B, N, D_out), or (B, T, D_out) with `queries`; a pair with `return_row_stats`.
        """
        norm_weight, norm_bias, eps = norm.operands
        weight, bias = weights(self.qkv)
        proj_weight, proj_bias = weights(self.proj)
        return kernels.layer_norm_attention(
            x, norm_weight, norm_bias, weight, bias, proj_weight, proj_bias, self.num_heads,
            eps, attention_scale(self, self.head_dim), row_stats=row_stats,
            implementation=self.backend, **rest,
        )  # fmt: skip

    def branch_around_linears(self, x, norm, layer_scale, drop_path):
        """The sum of x and its attention branch, fused around Linears that have to be called.

        Args:
            x: (B, N, D), the residual stream.
            norm: the `deit_fast.layers.LayerNorm` in front.
            layer_scale: timm's LayerScale, or an Identity.
            drop_path: timm's DropPath, or an Identity.
        """
        o = self._attend_packed(layer_norm_linear(x, norm, self.qkv, self.backend))
        return residual_linear(o, self.proj, x, layer_scale, drop_path, self.backend)

    def _attend_packed(self, qkv):
        """(B, N, 3 H d) -> (B, N, H d)."""
        return self._attend(*qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2))

    def _attend(self, q, k, v):
        """(B, T, H, d), (B, N, H, d) and (B, N, H, d) -> (B, T, H d)."""
        return kernels.attention(
            q, k, v, attention_scale(self, self.head_dim), implementation=self.backend
        ).flatten(2)
