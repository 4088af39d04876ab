"""The whole model: one embedding kernel, a last block for the prefix tokens, one classifier."""

from functools import partial
from typing import Any

import timm.models.deit as timm_deit
import timm.models.vision_transformer as timm_vit
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint, checkpoint_seq
from torch import nn

from deit_fast import kernels
from deit_fast.kernels.classifier import fuse
from deit_fast.kernels.patch_embed import normalize_reference

from ._base import Fast, is_identity, is_plain_linear, kind_of, why_not_dropouts
from ._fusion import FUSED, is_traced
from ._hooks import can_bypass, is_intercepted, is_monkey_patched, is_observed
from ._plans import planned
from .block import Block
from .layer_norm import LayerNorm
from .patch_embed import PatchEmbed


class FastTransformer(Fast):
    """Mixin of the whole models.

    Images are float (B, C, H, W), normalised, or uint8 (B, H, W, C), which are normalised here with
    the mean and std of the model's `pretrained_cfg`.
    """

    has_plan = False
    # those of timm's methods whose work `forward` does
    replaced_methods: tuple[str, ...] = ("forward_features", "forward_head", "pool", "_pos_embed")

    # timm's
    training: bool
    parameters: Any
    patch_embed: Any
    cls_token: Any
    reg_token: Any
    pos_embed: Any
    _pos_embed: Any
    pos_drop: Any
    patch_drop: Any
    norm_pre: Any
    blocks: Any
    norm: Any
    fc_norm: Any
    attn_pool: Any
    head_drop: Any
    head: Any
    forward_head: Any
    num_prefix_tokens: int
    no_embed_class: bool
    dynamic_img_size: bool
    global_pool: str
    grad_checkpointing: bool

    @planned(without=("blocks", "norm", "fc_norm", "head", "head_dist", "head_drop"))
    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Patches, positions and prefix tokens, (B, T + n, D), of an image."""
        if not self._fuses_patches(image):
            return self.patch_drop(self._pos_embed(self.patch_embed(self._normalized(image))))
        # views without a copy in backward, which an index would have
        tokens = [t.flatten(0, 1) for t in self._prefix_tokens()]
        prefix = torch.cat(tokens) if len(tokens) > 1 else next(iter(tokens), None)
        pos_embed = self.pos_embed
        if pos_embed is not None:
            if self.dynamic_img_size:
                pos_embed = resample_abs_pos_embed(
                    pos_embed,
                    new_size=self.patch_embed.dynamic_feat_size(_height_width(image)),
                    old_size=self.patch_embed.grid_size,
                    num_prefix_tokens=0 if self.no_embed_class else self.num_prefix_tokens,
                )
            pos_embed = pos_embed.flatten(0, 1)
        x = self.patch_embed.embed(image, pos_embed, prefix, *self._pixels_of(image))
        if pos_embed is not None:  # as timm: no dropout without positions
            x = self.pos_drop(x)
        return self.patch_drop(x)

    def _fuses_patches(self, image: Any) -> bool:
        embed = self.patch_embed
        return (
            type(embed) is PatchEmbed
            and can_bypass(embed)
            and not self._is_overridden()
            and embed.plan(image).unfused is None
        )

    def _pixels_of(self, image):
        """The mean and std of pixels for a uint8 image, else None."""
        if image.dtype != torch.uint8:
            return None, None
        config = getattr(self, "pretrained_cfg", None) or {}
        return config.get("mean"), config.get("std")

    def _is_overridden(self) -> bool:
        """Whether one of `replaced_methods` was replaced by the user.

        That may be on the instance, in a subclass, or in timm's own class.
        """
        ours = kind_of(self).__module__.startswith("deit_fast.layers.")
        if not ours or any(name in self.__dict__ for name in self.replaced_methods):
            return True
        return any(
            is_monkey_patched(self.timm_class, name) for name in ("forward", *self.replaced_methods)
        )

    def _normalized(self, image):
        """An image as timm's layers take it; the proxy of a tracer stands for one that is."""
        if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8:
            return image
        dtype = next(self.parameters()).dtype
        mean, std = self._pixels_of(image)
        return normalize_reference(image, mean, std, dtype)

    def _prefix_tokens(self) -> list[nn.Parameter]:
        return [t for t in (self.cls_token, self.reg_token) if t is not None]

    @planned(inference=True)
    def forward_features(self, x, attn_mask=None, is_causal=False):
        """Tokens after the final norm, (B, T + n, D), all of them."""
        if is_traced(x) or self._is_overridden():
            return self.timm_class.forward_features(self, self._normalized(x), attn_mask, is_causal)
        x = self.norm_pre(self.embed(x))
        if attn_mask is not None or is_causal:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        elif torch.is_grad_enabled() or not self._is_plain_sequential(self.blocks):
            x = self.blocks(x)
        else:
            x = run_blocks(self.blocks, x, return_row_stats=False)[0]
        return self.norm(x)

    @planned(inference=True)
    def forward(self, x, attn_mask=None, is_causal=False):
        """Logits (B, classes).

        The last block and the final norm run for the prefix tokens alone: 6.9% less arithmetic for
        DeiT, the same logits and the same gradients.
        """
        if attn_mask is not None or is_causal or is_traced(x) or not self._reads_prefix_only():
            return self.unfused(x, attn_mask=attn_mask, is_causal=is_causal)
        classify = self._classifier_operands()
        if classify is None:
            return self._norm_and_head(self._run_prefix(x))
        return kernels.classifier(self._run_prefix(x), **classify, implementation=self.backend)

    @planned(without=("blocks", "patch_embed", "pos_drop", "norm_pre", "patch_drop"))
    def _norm_and_head(self, x):
        return self.forward_head(self.norm(x))

    @planned(inference=True)
    def forward_pre_logits(self, x):
        """The input of the heads, (B, D): timm's `forward_head(..., pre_logits=True)`.

        The last block and the final norm run for the prefix tokens alone where `forward` does so.
        """
        if not self._reads_prefix_only():
            return self.forward_head(self.forward_features(x), pre_logits=True)
        return self.forward_head(self.norm(self._run_prefix(x)), pre_logits=True)

    def _run_prefix(self, x):
        """Tokens after the last block: as many as there are heads, or more."""
        x, before, last = self.norm_pre(self.embed(x)), self.blocks[:-1], self.blocks[-1]
        run_last, prunes, called = last, kind_of(last) is Block, is_intercepted(last)
        if prunes:
            run_last = partial(_last_prefix, last, called, len(self._heads()))
        if self.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint_seq(before, x) if len(before) else x
            return checkpoint(run_last, x)
        x, row_stats = run_blocks(before, x, return_row_stats=prunes and not called)
        return run_last(x) if row_stats is None else run_last(x, row_stats)

    def _heads(self) -> list[nn.Module]:
        return [self.head]

    def _final_norms(self) -> list[nn.Module]:
        return [self.norm, self.fc_norm]

    def _reads_prefix_only(self) -> bool:
        """Whether nothing but the prefix tokens of the last block is observed from outside."""
        norms, blocks = self._final_norms(), self.blocks
        return (
            type(blocks) is nn.Sequential
            and len(blocks) > 0
            and self.global_pool == "token"
            and self.attn_pool is None
            and all(is_identity(n) or type(n) is LayerNorm for n in norms)
            and not is_observed(blocks, blocks[-1], self.norm)
            and not self._is_overridden()
        )

    def _is_plain_sequential(self, blocks: nn.Module) -> bool:
        """Whether the container does nothing but call one block after the other."""
        return type(blocks) is nn.Sequential and not is_intercepted(blocks)

    def _has_plain_heads(self) -> bool:
        """Whether the heads are Linears behind a Dropout, without hooks."""
        plain = all(map(is_plain_linear, self._heads())) and not why_not_dropouts(self, "head_drop")
        return plain and can_bypass(self.head_drop, *self._heads())

    def _classifier_operands(self) -> dict | None:
        """Arguments of `kernels.classifier`, or None where timm's own head has to run.

        That is in training, and where it is more than a LayerNorm and Linears.
        """
        if self.training or torch.is_grad_enabled():
            return None
        norms = [n for n in self._final_norms() if not is_identity(n)]
        heads = self._heads()
        if len(norms) != 1 or type(norms[0]) is not LayerNorm:
            return None
        if not self._has_plain_heads() or not can_bypass(*self._final_norms()):
            return None
        if self.head_drop.training and getattr(self.head_drop, "p", 0) > 0:
            return None
        norm_weight, norm_bias, eps = norms[0].operands
        operands: dict[str, Any] = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
        for name, head in zip(("head", "dist"), heads, strict=False):
            operands |= {f"{name}_weight": head.weight, f"{name}_bias": head.bias}
        return operands


class VisionTransformer(FastTransformer, timm_vit.VisionTransformer):
    """timm's VisionTransformer (ViT, DeiT, DeiT-III)."""

    timm_class = timm_vit.VisionTransformer


class VisionTransformerDistilled(FastTransformer, timm_deit.VisionTransformerDistilled):
    """timm's VisionTransformerDistilled: class and distillation token, a head for each.

    `heads` says what inference returns: "joint" (mean of the logits, as timm), "joint_softmax"
    (sum of the softmax outputs, DeiT paper section 4), "class" or "distill". In train() timm
    decides: a tuple after `set_distilled_training(True)`.
    """

    timm_class = timm_deit.VisionTransformerDistilled
    heads = "joint"

    def _prefix_tokens(self):
        return [self.cls_token, self.dist_token]

    def _heads(self):
        return [self.head, self.head_dist]

    def _final_norms(self):
        return [self.norm]  # timm's distilled forward_head has no fc_norm

    def _classifier_operands(self):
        operands = super()._classifier_operands()
        return operands and operands | {"fusion": self.heads}

    def forward_head(self, x, pre_logits=False):
        own = self.training and not pre_logits and not is_traced(x) and not self._is_overridden()
        own = own and not getattr(self.head_drop, "inplace", False)
        if own and x.shape[1] == 2 and self._has_plain_heads():
            # timm's, but one operator splits the tokens: backward of two indices is five launches.
            # Nothing may change its outputs in place.
            tokens = [self.head_drop(t) for t in x.unbind(1)]
            y, y_dist = (head(t) for head, t in zip(self._heads(), tokens, strict=True))
            return (y, y_dist) if self.distilled_training else (y + y_dist) / 2
        if self.training or pre_logits or self.heads == "joint":
            return super().forward_head(x, pre_logits=pre_logits)
        logits = [head(self.head_drop(x[:, t])) for t, head in enumerate(self._heads())]
        if self.heads != "joint_softmax":
            logits = [logits[("class", "distill").index(self.heads)]]
        return fuse(self.heads, logits)


def run_blocks(blocks, x, return_row_stats=True, kind=Block):
    """Run blocks one after the other, handing row statistics from one to the next.

    Args:
        blocks: the blocks, in order.
        x: (B, N, D).
        return_row_stats: whether those of the result are of use.
        kind: the class of the blocks that hand them on: `Block`, or CaiT's `LayerScaleBlock`.

    Returns:
        The tokens (B, N, D), and their row statistics or None.
    """
    row_stats = None
    for i, block in enumerate(blocks, 1):
        if kind_of(block) is kind and not is_intercepted(block) and block.plan(x) is FUSED:
            more = return_row_stats or i < len(blocks)
            x, row_stats = block.forward_with_row_stats(x, row_stats, more)
        else:
            x, row_stats = block(x), None
    return x, row_stats


def _last_prefix(block, called, prefix, x, row_stats=None):
    return block(x, prefix=prefix) if called else block.forward_prefix(x, prefix, row_stats)


def _height_width(image: torch.Tensor) -> tuple[int, int]:
    first = 1 if image.dtype == torch.uint8 else 2
    height, width = image.shape[first : first + 2]
    return height, width
