"""The pieces of a residual branch: its scales, and its Linears where some have to be called.

A Linear has to be called if it is no plain nn.Linear (an adapter, a quantized layer of another
library) or if its call is intercepted. The functions here fuse what stays around it.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from deit_fast import kernels

from ._base import is_plain_linear, weights
from ._hooks import why_intercepted


def branch_scales(layer_scale: nn.Module | None, drop_path: nn.Module, x: Tensor) -> dict[str, Any]:
    """What a branch is multiplied by before it is added, as arguments of a kernel.

    Args:
        layer_scale: timm's LayerScale; None or another module for none.
        drop_path: timm's DropPath, or an Identity.
        x: (B, ...), the residual stream.

    Returns:
        `layer_scale`, gamma (D,), and `row_scale`, the drop-path mask (B,); None for either.
    """
    gamma = getattr(layer_scale, "gamma", None)
    return {"layer_scale": gamma, "row_scale": drop_path_mask(drop_path, x)}


def drop_path_mask(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The mask of stochastic depth, from the random numbers that timm would draw.

    Args:
        drop_path: timm's DropPath, or an Identity.
        x: (B, ...), the residual stream.

    Returns:
        (B,), 0 or 1 / keep for each sample, in x's dtype; None where every sample is kept.
    """
    p: Any = getattr(drop_path, "drop_prob", 0.0)
    if p == 0.0 or not drop_path.training:
        return None
    mask = x.new_empty(x.shape[0]).bernoulli_(1 - p)
    return mask.div_(1 - p) if p < 1.0 and drop_path.scale_by_keep else mask


def must_call(linear: nn.Module) -> bool:
    """Whether a Linear has to be called."""
    return not is_plain_linear(linear) or why_intercepted(linear) is not None


def linear(x: Tensor, module: Any, backend: str, activation: str = "none") -> Tensor:
    """`activation(module(x))`, as one kernel if the module may be bypassed.

    Args:
        x: (..., K).
        module: an nn.Linear with (N, K), or what took its place.
        backend: "auto", "triton" or "torch".
        activation: "none" or "gelu".
    """
    y: Any  # a tensor: the kernel returns a pair only with return_row_stats
    if not must_call(module):
        weight, bias = weights(module)
        y = kernels.linear(x, weight, bias, activation, implementation=backend)
        return y
    y = module(x)
    return F.gelu(y) if activation == "gelu" else y


def layer_norm_linear(
    x: Tensor, norm: Any, module: Any, backend: str, activation: str = "none"
) -> Tensor:
    """`activation(module(norm(x)))`, as one kernel if the module may be bypassed.

    Args:
        x: (..., K).
        norm: a `deit_fast.layers.LayerNorm` that may be bypassed.
        module: an nn.Linear with (N, K), or what took its place.
        backend: "auto", "triton" or "torch".
        activation: "none" or "gelu".
    """
    norm_weight, norm_bias, eps = norm.operands
    if must_call(module):
        x = kernels.layer_norm(x, norm_weight, norm_bias, eps, implementation=backend)
        return linear(x, module, backend, activation)
    weight, bias = weights(module)
    return kernels.layer_norm_linear(
        x, norm_weight, norm_bias, weight, bias, eps, activation, implementation=backend
    )


def residual_linear(
    x: Tensor, module: Any, residual: Tensor, layer_scale: Any, drop_path: Any, backend: str
) -> Tensor:
    """`residual + drop_path(layer_scale(module(x)))`, as one kernel if the module may be bypassed.

    The drop-path mask is drawn after the random numbers of modules that are called before it, as in
    timm.

    Args:
        x: (B, N, K).
        module: an nn.Linear with (D, K), or what took its place.
        residual: (B, N, D), the residual stream.
        layer_scale: timm's LayerScale, or an Identity.
        drop_path: timm's DropPath, or an Identity.
        backend: "auto", "triton" or "torch".
    """
    if must_call(module):
        return residual + drop_path(layer_scale(module(x)))
    weight, bias = weights(module)
    y: Any = kernels.linear(
        x, weight, bias, residual=residual, **branch_scales(layer_scale, drop_path, residual),
        implementation=backend,
    )  # fmt: skip
    return y
