"""TinyViT (Wu et al., 2022): convolutions with folded batch norm, attention in windows of the map.

Maps are (B, C, Y, X) between the convolutional parts and (B, Y, X, C) in the transformer's, which
are one and the same memory where channels lie side by side. They do from the first convolution on
in inference; in training, where convolutions and batch norm are PyTorch's, they do where images or
weights are channels_last.
"""

from typing import Any

import timm.models.tiny_vit as timm_tiny
import torch
from torch import nn
from torch.nn import functional as F

from deit_fast import kernels
from deit_fast.kernels.window_attention import HEAD_DIM

from ._base import (
    Fast,
    attention_scale,
    class_name,
    is_exact_gelu,
    is_identity,
    weights,
    why_not_drop_path,
    why_not_parts,
)
from ._branch import branch_scales
from ._plans import planned
from .layer_norm import LayerNorm
from .mlp import why_not_mlp


class ConvNorm(Fast, timm_tiny.ConvNorm):
    """timm's ConvNorm: convolution and batch norm, (B, C, Y, X) -> (B, D, Y', X').

    It takes what follows it in TinyViT as an epilogue: y = activation(norm(conv(x)) + residual).

    In inference it is one kernel. The convolution and the norm run unfused while batch norm takes
    its statistics from the batch, where gradients are wanted, with hooks on them, and after they
    were changed.
    """

    timm_class = timm_tiny.ConvNorm
    called_by_parent = True
    rechecks_why_not = True

    @classmethod
    def why_not(cls, module):
        conv, bn = module.conv, module.bn
        if type(conv) is not nn.Conv2d or "weight" not in conv._parameters:
            return "conv is not a plain nn.Conv2d"
        if conv.bias is not None or conv.padding_mode != "zeros":
            return "conv has a bias, or pads with other than zeros"
        for name in ("kernel_size", "stride", "padding"):
            if len(set(getattr(conv, name))) != 1:
                return f"conv has {name} {getattr(conv, name)}"
        if conv.dilation != (1, 1):
            return "conv is dilated"
        if type(bn) is not nn.BatchNorm2d or bn.weight is None or bn.running_mean is None:
            return "bn is not a nn.BatchNorm2d with weights and statistics"
        return None

    def forward(self, x, activation="none", residual=None):
        conv, bn = self.conv, self.bn
        fused = not bn.training and not torch.is_grad_enabled()
        if self.plan(x).unfused or not fused:
            y = self.unfused(x)
            y = y if residual is None else y + residual.to(y.dtype)
            return F.gelu(y) if activation == "gelu" else y
        return kernels.conv_norm(
            x, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps,
            conv.stride[0], conv.padding[0], conv.groups, activation, residual,
            implementation=self.backend,
        )  # fmt: skip


class _Convolutions(Fast):
    """Mixin of the modules that are made of ConvNorms with GELU behind them.

    With hooks on these nothing is fused across them, so that the hooks see what timm's would.
    """

    @classmethod
    def why_not(cls, module):
        for name, part in module.named_children():
            if name.startswith("conv") and type(part) is not ConvNorm:
                return f"{name} stays with timm"
            if name.startswith("act") and not is_exact_gelu(part):
                return f"has activation {class_name(part)}, not the exact GELU"
        return why_not_drop_path(module, "drop_path")

    @planned()
    def forward(self, x):
        return self.unfused(x) if self.plan(x).unfused else self._fused(x)

    def _fused(self, x):
        raise NotImplementedError


class PatchEmbed(_Convolutions, timm_tiny.PatchEmbed):
    """timm's PatchEmbed of TinyViT: (B, C, Y, X) -> (B, D, Y / 4, X / 4)."""

    timm_class = timm_tiny.PatchEmbed

    def _fused(self, x):
        return self.conv2(self.conv1(x, "gelu"))


class PatchMerging(_Convolutions, timm_tiny.PatchMerging):
    """timm's PatchMerging: (B, C, Y, X) -> (B, D, Y / 2, X / 2)."""

    timm_class = timm_tiny.PatchMerging

    def _fused(self, x):
        return self.conv3(self.conv2(self.conv1(x, "gelu"), "gelu"))


class MBConv(_Convolutions, timm_tiny.MBConv):
    """timm's MBConv: (B, C, Y, X) -> the same shape; GELU behind the residual."""

    timm_class = timm_tiny.MBConv

    def _fused(self, x):
        hidden = self.conv2(self.conv1(x, "gelu"), "gelu")
        if is_identity(self.drop_path) or not self.drop_path.training:
            return self.conv3(hidden, "gelu", x)
        y = self.drop_path(self.conv3(hidden))
        return F.gelu(y + x.to(y.dtype))


class Attention(Fast, timm_tiny.Attention):
    """timm's Attention of TinyViT, LayerNorm included: a window (B, L, C) -> (B, L, C)."""

    timm_class = timm_tiny.Attention
    rechecks_why_not = True
    linears = ("qkv", "proj")

    @classmethod
    def why_not(cls, module):
        if why := why_not_parts(module, norm=LayerNorm):
            return why
        if "get_attention_biases" in module.__dict__:
            return "has a get_attention_biases of its own"
        if (module.key_dim, module.val_dim) != (HEAD_DIM, HEAD_DIM):
            return (
                f"has heads of {module.key_dim} and {module.val_dim}, the kernel takes {HEAD_DIM}"
            )
        if module.resolution[0] != module.resolution[1]:
            return f"has windows of {module.resolution}, expected square ones"
        return None

    def forward(self, x):
        if self.plan(x).unfused:
            return self.unfused(x)
        return self.branch(x.unflatten(1, self.resolution)).flatten(1, 2)

    def branch(self, x, **epilogue):
        """Window attention of a whole map, LayerNorm included.

        Args:
            x: (B, Y, X, C), Y and X multiples of the window's.
            epilogue: of the projection, as `deit_fast.kernels.linear` takes it.

        Returns:
            (B, Y, X, C).
        """
        use: dict[str, Any] = {"implementation": self.backend}
        norm_weight, norm_bias, eps = self.norm.operands
        qkv = kernels.layer_norm_linear(x, norm_weight, norm_bias, *weights(self.qkv), eps, **use)
        o = kernels.window_attention(
            qkv.unflatten(-1, (self.num_heads, 3, HEAD_DIM)), self.attention_biases,
            self.resolution[0], attention_scale(self, HEAD_DIM), **use,
        )  # fmt: skip
        proj_weight, proj_bias = weights(self.proj)
        return kernels.linear(o.flatten(3), proj_weight, proj_bias, **epilogue, **use)


class NormMlp(Fast, timm_tiny.NormMlp):
    """timm's NormMlp without dropout: LayerNorm, fc1, GELU, fc2, (..., C) -> (..., C_out).

    `recompute` as `deit_fast.layers.Block`'s; attention saves the output of its LayerNorm.
    """

    timm_class = timm_tiny.NormMlp
    linears = ("fc1", "fc2")
    recompute = True

    @classmethod
    def why_not(cls, module):
        return why_not_parts(module, norm=LayerNorm) or why_not_mlp(module)

    def forward(self, x):
        return self.unfused(x) if self.plan(x).unfused else self.branch(x)

    def branch(self, x, **epilogue):
        """The MLP, (..., C) -> (..., C_out).

        Args:
            x: (..., C).
            epilogue: as `deit_fast.kernels.layer_norm_mlp` takes it.
        """
        norm_weight, norm_bias, eps = self.norm.operands
        return kernels.layer_norm_mlp(
            x, norm_weight, norm_bias, *weights(self.fc1), *weights(self.fc2), eps, **epilogue,
            recompute=self.recompute, implementation=self.backend,
        )  # fmt: skip


class TinyVitBlock(Fast, timm_tiny.TinyVitBlock):
    """timm's TinyVitBlock: (B, Y, X, C) -> the same shape.

    Both residual additions and stochastic depth are epilogues. A map that is no multiple of the
    window is padded with zeros, which attend, as in timm. That copies the map twice; maps of the
    sizes the model was made for need no padding.
    """

    timm_class = timm_tiny.TinyVitBlock
    rechecks_why_not = True
    always_called = ("local_conv",)

    @classmethod
    def why_not(cls, module):
        why = why_not_parts(module, attn=Attention, mlp=NormMlp)
        return why or why_not_drop_path(module, "drop_path1", "drop_path2")

    @planned()
    def forward(self, x):
        if self.plan(x).unfused:
            return self.unfused(x)
        Y, X = x.shape[1:3]
        down, right = -Y % self.window_size, -X % self.window_size
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        x = self.attn.branch(x, residual=x, **branch_scales(None, self.drop_path1, x))
        if down or right:
            x = x[:, :Y, :X]
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.mlp.branch(x, residual=x, **branch_scales(None, self.drop_path2, x))
