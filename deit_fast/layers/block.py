"""Pre-norm transformer block: both residual additions are epilogues of the GEMMs before them."""

from typing import Any

import timm.layers
import timm.models.vision_transformer as timm_vit
import torch

from deit_fast.kernels.layer_norm_linear import uses_row_stats

from ._base import (
    Fast,
    class_name,
    is_identity,
    is_plain_linear,
    why_not_drop_path,
    why_not_parts,
)
from ._branch import branch_scales
from ._fusion import FUSED
from ._plans import planned
from .attention import Attention
from .layer_norm import LayerNorm
from .mlp import Mlp


class Block(Fast, timm_vit.Block):
    """timm's Block: (B, N, D) -> (B, N, D). Stochastic depth and LayerScale are fused too.

    timm's own forward runs where the call of a layer inside is intercepted, where a layer is of
    another kind or drops numbers, and with a mask or causal attention given at run time. Around
    Linears that have to be called the rest stays fused: see `deit_fast.layers._fusion`.

    In training each branch is one node of the autograd graph. The tensors saved for backward, with
    M = B N rows, H heads and f hidden features:

        residual stream before each branch   2 M D   in x's dtype: fp32 under autocast
        qkv, output of attention             4 M D   in the dtype of the GEMMs
        log-sum-exp of the softmax           M H     fp32
        output of fc1 before GELU            M f     in the dtype of the GEMMs
        the weights as the GEMMs read them: under autocast a copy in its dtype

    The GEMMs run in bf16 or fp16 where autocast or the weights say so, else in fp32. The outputs of
    both LayerNorms (2 M D) and of GELU (M f) are recomputed in backward; with `recompute = False`
    they are saved as well, for speed. Gradients have the dtype of what they belong to; sums over
    rows (biases, norms, LayerScale) are fp32 until then.
    """

    timm_class = timm_vit.Block
    fuses_around_linears = True
    recompute = True

    @classmethod
    def why_not(cls, module):
        # its parts were replaced first and say most of it
        why = why_not_parts(module, norm1=LayerNorm, attn=Attention, norm2=LayerNorm, mlp=Mlp)
        if why:
            return why
        for name in ("ls1", "ls2"):
            scale = getattr(module, name)
            if not is_identity(scale) and type(scale) is not timm.layers.LayerScale:
                return f"{name} is a {class_name(scale)}"
        return why_not_drop_path(module, "drop_path1", "drop_path2")

    def forward(self, x, attn_mask=None, is_causal=False, prefix=None):
        """With `prefix` it is `forward_prefix`."""
        if attn_mask is not None or is_causal:
            return self.unfused(x, attn_mask=attn_mask, is_causal=is_causal)
        if prefix is not None:
            return self.forward_prefix(x, prefix)
        plan = self.plan(x)
        if plan is FUSED:
            return self.forward_with_row_stats(x, None, False)[0]
        return self.unfused(x) if plan.unfused else self._forward_around_linears(x)

    def _forward_around_linears(self, x):
        x = self.attn.branch_around_linears(x, self.norm1, self.ls1, self.drop_path1)
        return self.mlp.branch_around_linears(x, self.norm2, self.ls2, self.drop_path2)

    @planned()
    def forward_with_row_stats(self, x, row_stats, return_row_stats=True):
        """The fused forward, with row statistics from the block before and for the next one.

        A GEMM's epilogue makes the row statistics of the residual stream, and the LayerNorm behind
        it is folded into the next GEMM: see `deit_fast.kernels.layer_norm_linear`.

        Args:
            x: (B, N, D).
            row_stats: the row statistics of x, or None.
            return_row_stats: whether those of the result are of use.

        Returns:
            The block's output (B, N, D), and its row statistics or None.
        """
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

    @planned()
    def forward_prefix(
        self, x: torch.Tensor, prefix: int, row_stats: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`forward(x)[:, :prefix]`, computed for these tokens alone if the block is fused.

        Args:
            x: (B, N, D).
            prefix: the number of tokens that are queries and go through projection and MLP.
            row_stats: the row statistics of x, or None.

        Returns:
            (B, prefix, D), contiguous.
        """
        if self.plan(x) is not FUSED:
            return self.forward(x)[:, :prefix].contiguous()
        scales = branch_scales(self.ls1, self.drop_path1, x) | {"recompute": self.recompute}
        x = self.attn.branch(
            x, self.norm1, row_stats=row_stats, residual=x, queries=prefix, **scales
        )
        scales = branch_scales(self.ls2, self.drop_path2, x) | {"recompute": self.recompute}
        return self.mlp.branch(x, self.norm2, residual=x, **scales)


def wants_row_stats(x: torch.Tensor, linear: Any) -> bool:
    """Whether x's row statistics are of use: a LayerNorm in front of `linear` is then folded."""
    if torch.is_grad_enabled() or not is_plain_linear(linear):  # a quantized one
        return False
    return uses_row_stats(x, linear.weight)
