"""The pieces of a block: what a branch is scaled by, and products around Linears of which some have
to be called."""

import torch
from torch import nn
from torch.nn import functional as F

from deit_fast import kernels

from ._base import weights
from ._bypass import is_plain, why_watched


def branch_scales(
    layer_scale: nn.Module | None, drop_path: nn.Module, x: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """What a branch is multiplied by before it is added: LayerScale's gamma (D,), `row_scale`."""
    gamma = getattr(layer_scale, "gamma", None)
    return {"layer_scale": gamma, "row_scale": row_scale(drop_path, x)}


def row_scale(drop_path: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Stochastic depth's 0 or 1 / keep per sample (B,), drawn from the generator just as timm draws
    it; None where it keeps everything."""
    p = getattr(drop_path, "drop_prob", 0.0)
    if p == 0.0 or not drop_path.training:
        return None
    kept = x.new_empty(x.shape[0]).bernoulli_(1 - p)
    return kept.div_(1 - p) if p < 1.0 and drop_path.scale_by_keep else kept


def is_called(linear: nn.Module) -> bool:
    return not is_plain(linear) or why_watched(linear) is not None


def linear(x, module, backend, activation="none"):
    """`activation(module(x))`, one operation where nobody asks for the call."""
    if not is_called(module):
        return kernels.linear(x, *weights(module), activation, implementation=backend)
    y = module(x)
    return F.gelu(y) if activation == "gelu" else y


def normalized_linear(x, norm, module, backend, activation="none"):
    """`activation(module(norm(x)))`; `norm` is a LayerNorm of ours that nobody watches."""
    if is_called(module):
        x = kernels.layer_norm(x, *norm.operands, implementation=backend)
        return linear(x, module, backend, activation)
    norm_weight, norm_bias, eps = norm.operands
    return kernels.layer_norm_linear(
        x, norm_weight, norm_bias, *weights(module), eps, activation, implementation=backend
    )


def residual_linear(x, module, residual, layer_scale, drop_path, backend):
    """`residual + drop_path(layer_scale(module(x)))`. Stochastic depth draws its numbers after what
    was called before it, as in timm."""
    if is_called(module):
        return residual + drop_path(layer_scale(module(x)))
    return kernels.linear(
        x, *weights(module), residual=residual, **branch_scales(layer_scale, drop_path, residual),
        implementation=backend,
    )  # fmt: skip
