"""Pre-norm transformer block: both residual additions are epilogues of the products before them."""

import timm.layers
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from deit_fast.kernels.layer_norm_linear import uses_row_stats

from ._base import Fast, is_identity, why_not_drop_path, why_not_parts
from ._bypass import FUSED, class_name, is_plain
from ._parts import branch_scales
from .attention import Attention
from .layer_norm import LayerNorm
from .mlp import Mlp


class Block(Fast, timm_vit.Block):
    """timm's Block: (B, N, D) -> (B, N, D). Stochastic depth and LayerScale are fused too.

    Where a layer inside it is watched, was replaced by another kind or drops numbers, and with a
    mask or causal attention given at run time, timm's own forward runs; around Linears that have to
    be called the rest stays fused: see `_bypass`.

    In training each half is one node of the graph. It saves (M = B N rows, H heads, `f` hidden
    features; products in bf16 or fp16 where autocast or the weights say so, else in fp32):

        the stream x before each half      2 M D   in x's dtype: fp32 under autocast
        qkv, attention's result            4 M D   in the products' dtype
        sums of softmax                    M H     fp32
        fc1's result before GELU           M f     in the products' dtype
        the weights as the products read them: under autocast a copy in its dtype

    Both LayerNorms' results (2 M D) and GELU's (M f) are made again in backward; with
    `recompute = False` they are saved as well, for speed. Gradients arrive in the dtype of what
    they belong to; sums over rows (biases, norms, LayerScale) are fp32 until then.
    """

    timm_class = timm_vit.Block
    calls_linears = True
    recompute = True

    @classmethod
    def why_not(cls, module):
        """Its parts are swapped first, so they say most of it."""
        why = why_not_parts(module, norm1=LayerNorm, attn=Attention, norm2=LayerNorm, mlp=Mlp)
        if why:
            return why
        for name in ("ls1", "ls2"):
            scale = getattr(module, name)
            if not is_identity(scale) and type(scale) is not timm.layers.LayerScale:
                return f"{name} is a {class_name(scale)}"
        return why_not_drop_path(module, "drop_path1", "drop_path2")

    def forward(self, x, attn_mask=None, is_causal=False, prefix=None):
        """With `prefix`: `forward_prefix`."""
        if attn_mask is not None or is_causal:
            return self.unfused(x, attn_mask=attn_mask, is_causal=is_causal)
        if prefix is not None:
            return self.forward_prefix(x, prefix)
        plan = self.plan(x)
        if plan is FUSED:
            return self.forward_with_row_stats(x, None, False)[0]
        return self.unfused(x) if plan.unfused else self._in_parts(x)

    def _in_parts(self, x):
        x = self.attn.in_parts(x, self.norm1, self.ls1, self.drop_path1)
        return self.mlp.in_parts(x, self.norm2, self.ls2, self.drop_path2)

    def forward_with_row_stats(self, x, row_stats, return_row_stats=True):
        """`forward(x)`, given the row statistics of x's rows, and those of its own, of which the next
        block makes its LayerNorm; None for either: see `deit_fast.kernels.layer_norm_linear`."""
        scales = branch_scales(self.ls1, self.drop_path1, x) | {"recompute": self.recompute}
        wanted = wants_row_stats(x, self.mlp.fc1)
        x = self.attn.branch(
            x, self.norm1, row_stats=row_stats, residual=x, return_row_stats=wanted, **scales
        )
        x, row_stats = x if wanted else (x, None)
        scales = branch_scales(self.ls2, self.drop_path2, x) | {"recompute": self.recompute}
        wanted = return_row_stats and wants_row_stats(x, self.attn.qkv)  # the next one's is alike
        x = self.mlp.branch(
            x, self.norm2, row_stats=row_stats, residual=x, return_row_stats=wanted, **scales
        )
        return x if wanted else (x, None)

    def forward_prefix(self, x: torch.Tensor, prefix: int, row_stats=None) -> torch.Tensor:
        """`forward(x)[:, :prefix]`, with queries, projection and MLP for those tokens alone where
        the block is fused."""
        if self.plan(x) is not FUSED:
            return self.forward(x)[:, :prefix].contiguous()
        first = x[:, :prefix].contiguous()
        scales = branch_scales(self.ls1, self.drop_path1, x)
        x = self.attn.branch(x, self.norm1, first, row_stats, residual=first, **scales)
        scales = branch_scales(self.ls2, self.drop_path2, x)
        return self.mlp.branch(x, self.norm2, residual=x, **scales)


def wants_row_stats(x: torch.Tensor, linear: nn.Module) -> bool:
    """Whether the LayerNorm in front of `linear` may be folded into it, given x's row statistics."""
    if torch.is_grad_enabled() or not is_plain(linear):  # one in eight bits
        return False
    return uses_row_stats(x, linear.weight)
