"""CaiT: talking-heads attention in the trunk, then a class token that attends to the patches.

Source: Touvron et al. 2021, Going deeper with Image Transformers.
"""

from typing import Any

import timm.models.cait as timm_cait
import torch
from timm.models import checkpoint_seq

from deit_fast import kernels
from deit_fast.kernels import talking_heads
from deit_fast.kernels.attention import HEAD_DIMS

from ._base import (
    Fast,
    attention_scale,
    is_identity,
    weights,
    why_not_drop_path,
    why_not_dropouts,
    why_not_parts,
)
from ._branch import drop_path_mask
from ._fusion import is_traced
from ._hooks import is_observed
from ._plans import planned
from .block import wants_row_stats
from .layer_norm import LayerNorm
from .mlp import Mlp
from .vision_transformer import FastTransformer, run_blocks


class TalkingHeadAttn(Fast, timm_cait.TalkingHeadAttn):
    """timm's TalkingHeadAttn: (B, N, D) -> (B, N, D).

    timm's own forward runs with active dropout and where a Linear has to be called.
    """

    timm_class = timm_cait.TalkingHeadAttn
    linears = ("qkv", "proj", "proj_l", "proj_w")

    @classmethod
    def why_not(cls, module):
        H = module.num_heads
        rows = getattr(module.proj, "in_features", 0)  # 0: not a Linear, which `plan` tells
        why = rows and talking_heads.why_not(H, rows // H)
        return why or why_not_dropouts(module, "attn_drop", "proj_drop")

    def forward(self, x):
        if self.plan(x).unfused:
            return self.unfused(x)
        qkv = kernels.linear(x, *weights(self.qkv), implementation=self.backend)
        return kernels.linear(self._attend(qkv), *weights(self.proj), implementation=self.backend)

    def branch(self, x, norm, row_stats=None, **epilogue):
        """The attention branch of a LayerScaleBlock, LayerNorm included.

        Args:
            x: (B, N, D), the residual stream.
            norm: the `deit_fast.layers.LayerNorm` in front.
            row_stats: the row statistics of x, if they are known.
            epilogue: of the projection, as `deit_fast.kernels.linear` takes it.

        Returns:
            (B, N, D); a pair with `return_row_stats`.
        """
        norm_weight, norm_bias, eps = norm.operands
        qkv = kernels.layer_norm_linear(
            x, norm_weight, norm_bias, *weights(self.qkv), eps, row_stats=row_stats,
            implementation=self.backend,
        )  # fmt: skip
        weight, bias = weights(self.proj)
        return kernels.linear(
            self._attend(qkv), weight, bias, **epilogue, implementation=self.backend
        )

    def _attend(self, qkv):
        return kernels.talking_heads_attention(
            qkv.unflatten(2, (3, self.num_heads, -1)), *weights(self.proj_l), *weights(self.proj_w),
            self.scale, self.backend,
        ).flatten(2)  # fmt: skip


class ClassAttn(Fast, timm_cait.ClassAttn):
    """timm's ClassAttn: (B, N, D) -> (B, 1, D), the first token is the only query.

    timm's own forward runs with active dropout and where a Linear has to be called. The attention
    is PyTorch's where `deit_fast.kernels.attention` has no kernel for the head dimension.
    """

    timm_class = timm_cait.ClassAttn
    linears = ("q", "k", "v", "proj")

    @classmethod
    def why_not(cls, module):
        return why_not_dropouts(module, "attn_drop", "proj_drop")

    def forward(self, x):
        return self.unfused(x) if self.plan(x).unfused else self.branch(x)

    def branch(self, x, **epilogue):
        """The class attention of a LayerScaleBlockClassAttn.

        Args:
            x: (B, N, D), normalised, the class token first.
            epilogue: of the projection, as `deit_fast.kernels.linear` takes it.

        Returns:
            (B, 1, D).
        """
        use: dict[str, Any] = {"implementation": self.backend}
        linear: Any = kernels.linear  # returns a pair only with return_row_stats
        q, k, v = (
            linear(rows, *weights(module), **use).unflatten(2, (self.num_heads, -1))
            for rows, module in ((x[:, :1], self.q), (x, self.k), (x, self.v))
        )
        by = self.backend if q.shape[3] in HEAD_DIMS else "torch"
        o = kernels.attention(q, k, v, attention_scale(self, q.shape[3]), implementation=by)
        return linear(o.flatten(2), *weights(self.proj), **epilogue, **use)


class _LayerScaleBlock(Fast):
    """Both kinds of block: LayerNorm, attention, LayerNorm, MLP, and one DropPath."""

    recompute = True
    attention: type[Fast]  # the class of attn
    # timm's
    mlp: Any
    norm2: Any
    gamma_2: Any
    drop_path: Any

    @classmethod
    def why_not(cls, module):
        # its parts were replaced first and say most of it
        parts: dict[str, type[Fast]] = {
            "norm1": LayerNorm,
            "attn": cls.attention,
            "norm2": LayerNorm,
            "mlp": Mlp,
        }
        return why_not_parts(module, **parts) or why_not_drop_path(module, "drop_path")

    def _mlp_branch(self, x, **row_stats):
        return self.mlp.branch(
            x, self.norm2, residual=x, layer_scale=self.gamma_2,
            row_scale=drop_path_mask(self.drop_path, x), recompute=self.recompute, **row_stats,
        )  # fmt: skip


class LayerScaleBlock(_LayerScaleBlock, timm_cait.LayerScaleBlock):
    """timm's LayerScaleBlock: (B, N, D) -> (B, N, D), LayerScale and stochastic depth fused.

    timm's own forward runs where the call of a layer inside is intercepted or a layer is of another
    kind: see `deit_fast.layers._fusion`. In training `recompute` is about the MLP branch; the
    attention branch saves the output of its LayerNorm.
    """

    timm_class = timm_cait.LayerScaleBlock
    attention = TalkingHeadAttn

    def forward(self, x):
        if self.plan(x).unfused:
            return self.unfused(x)
        return self.forward_with_row_stats(x, None, False)[0]

    @planned()
    def forward_with_row_stats(self, x, row_stats, return_row_stats=True):
        """As `deit_fast.layers.Block.forward_with_row_stats`."""
        wanted = wants_row_stats(x, self.mlp.fc1)
        x = self.attn.branch(
            x, self.norm1, row_stats, residual=x, layer_scale=self.gamma_1,
            row_scale=drop_path_mask(self.drop_path, x), return_row_stats=wanted,
        )  # fmt: skip
        x, row_stats = x if wanted else (x, None)
        wanted = return_row_stats and wants_row_stats(x, self.attn.qkv)  # the next one's is alike
        x = self._mlp_branch(x, row_stats=row_stats, return_row_stats=wanted)
        return x if wanted else (x, None)


class LayerScaleBlockClassAttn(_LayerScaleBlock, timm_cait.LayerScaleBlockClassAttn):
    """timm's LayerScaleBlockClassAttn: patches (B, N, D) and class token (B, 1, D) -> (B, 1, D).

    timm's own forward runs as in `LayerScaleBlock`.
    """

    timm_class = timm_cait.LayerScaleBlockClassAttn
    attention = ClassAttn

    def forward(self, x, x_cls):
        if self.plan(x).unfused:
            return self.unfused(x, x_cls)
        return self._forward(x, x_cls)

    @planned()
    def _forward(self, x, x_cls):
        norm_weight, norm_bias, eps = self.norm1.operands
        u = kernels.layer_norm(
            torch.cat((x_cls, x), dim=1), norm_weight, norm_bias, eps, implementation=self.backend
        )
        x_cls = self.attn.branch(
            u,
            residual=x_cls,
            layer_scale=self.gamma_1,
            row_scale=drop_path_mask(self.drop_path, x_cls),
        )
        return self._mlp_branch(x_cls)


class Cait(FastTransformer, timm_cait.Cait):
    """timm's Cait. Patches and positions are one kernel, class token and head another."""

    timm_class = timm_cait.Cait
    replaced_methods = ("forward_features", "forward_head", "forward_cls")

    def embed(self, image):
        """Patches and positions, (B, n, D), of an image."""
        if self._fuses_patches(image):
            mean, std = self._pixels_of(image)
            x = self.patch_embed.embed(image, self.pos_embed[0], mean=mean, std=std)
        else:
            x = self.patch_embed(self._normalized(image)) + self.pos_embed
        return self.pos_drop(x)

    @planned(inference=True)
    def forward_features(self, x):  # type: ignore[override]  # timm's Cait takes no mask
        """Tokens after the final norm, (B, 1 + n, D), all of them."""
        if is_traced(x) or self._is_overridden():
            return self.timm_class.forward_features(self, self._normalized(x))
        x = self._run_trunk(self.embed(x))
        if self.blocks_token_only is not None:  # a pruned model has none
            x = torch.cat((self._class_token(x), x), dim=1)
        return self.norm(x)

    @planned(inference=True)
    def forward(self, x):  # type: ignore[override]  # timm's Cait takes no mask
        """Logits (B, classes).

        The final norm runs for the class token alone where nothing else is observed.
        """
        if is_traced(x) or not self._reads_prefix_only():
            return self.forward_head(self.forward_features(x))
        classify = self._classifier_operands()
        cls_token = self._run_prefix(x)
        if classify is None:
            return self.forward_head(self.norm(cls_token))
        return kernels.classifier(cls_token, **classify, implementation=self.backend)

    def _run_trunk(self, x):
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)
        if torch.is_grad_enabled() or not self._is_plain_sequential(self.blocks):
            return self.blocks(x)
        return run_blocks(self.blocks, x, return_row_stats=False, kind=LayerScaleBlock)[0]

    def _run_prefix(self, x):
        """The class token (B, 1, D) after the last block."""
        return self._class_token(self._run_trunk(self.embed(x)))

    def _class_token(self, x):
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            cls_token = block(x, cls_token)
        return cls_token

    def _final_norms(self):
        return [self.norm]

    def _reads_prefix_only(self):
        return (
            len(self.blocks) > 0
            and self.blocks_token_only is not None
            and self.global_pool == "token"
            and (is_identity(self.norm) or type(self.norm) is LayerNorm)
            and not is_observed(self.norm)
            and not self._is_overridden()
        )
