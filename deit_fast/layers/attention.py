"""Multi-head self-attention: qkv product, attention out of its layout, projection."""

import timm.layers

from deit_fast import kernels
from deit_fast.kernels import _runtime
from deit_fast.kernels.attention import HEAD_DIMS

from ._base import Fast, is_identity, is_linear, weights


class Attention(Fast, timm.layers.Attention):
    """timm's Attention without q/k norm, gate and dropout: (B, N, D) -> (B, N, D_out).

    A mask or causal attention given at run time goes through timm's own forward.
    """

    timm_class = timm.layers.Attention

    @classmethod
    def why_not(cls, module):
        if not is_identity(module.q_norm) or not is_identity(module.k_norm):
            return "normalises q and k"
        if not is_identity(getattr(module, "norm", None)):
            return "has a norm before the projection"
        if getattr(module, "gate", None) is not None:
            return "has a gate"
        if module.attn_drop.p > 0 or module.proj_drop.p > 0:
            return "has dropout"
        if not is_linear(module.qkv) or not is_linear(module.proj):
            return "qkv or proj is not an nn.Linear"
        if module.head_dim not in HEAD_DIMS:
            return f"head dimension {module.head_dim}, the kernel takes {HEAD_DIMS}"
        return None

    def forward(
        self, x, attn_mask=None, is_causal=False, *,
        norm=None, prefix=None, residual=None, layer_scale=None, row_scale=None,
    ):  # fmt: skip
        """`norm` (a LayerNorm module) comes first. With `prefix` only the first tokens ask, and all
        answer: (B, prefix, D_out). The rest is the projection's epilogue:
        [row_scale * layer_scale *] ... + residual."""
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        use = {"implementation": self.backend}
        if norm is not None:
            x = kernels.layer_norm(x, *norm.operands, out_dtype=_runtime.autocast_dtype(x), **use)
        (B, N, _), H, d = x.shape, self.num_heads, self.head_dim
        weight, bias = weights(self.qkv)
        if prefix is None:
            q, k, v = kernels.linear(x, weight, bias, **use).view(B, N, 3, H, d).unbind(2)
        else:
            q_bias, kv_bias = (None, None) if bias is None else bias.split((H * d, 2 * H * d))
            q = kernels.linear(x[:, :prefix], weight[: H * d], q_bias, **use)
            q = q.view(B, prefix, H, d)
            k, v = kernels.linear(x, weight[H * d :], kv_bias, **use).view(B, N, 2, H, d).unbind(2)
        o = kernels.attention(q, k, v, self.scale, **use).flatten(2)
        return kernels.linear(
            o, *weights(self.proj), residual=residual, layer_scale=layer_scale,
            row_scale=row_scale, **use,
        )  # fmt: skip
