"""LayerNorm as one kernel."""

from typing import Any

import timm.layers
import torch
from torch import nn
from torch.fx import Proxy

from deit_fast import kernels
from deit_fast.kernels.layer_norm import MAX_N

from ._base import Fast


class LayerNorm(Fast, timm.layers.LayerNorm):
    """timm's (and torch's) LayerNorm over the last dimension: (..., N) -> (..., N)."""

    timm_class = timm.layers.LayerNorm

    @classmethod
    def why_not(cls, module):
        if len(module.normalized_shape) != 1:
            return f"normalises {len(module.normalized_shape)} dimensions, not one"
        if module.weight is None or module.bias is None:
            return "has no weight or no bias"
        if module.normalized_shape[0] > MAX_N:
            return f"{module.normalized_shape[0]} features, more than {MAX_N}"
        if getattr(module, "_fast_norm", False):
            return "timm's fast_norm option is on"
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.plan(x).unfused:
            return self.unfused(x)
        return kernels.layer_norm(x, *self.operands, implementation=self.backend)

    def unfused(self, x):
        """The forward of PyTorch's or timm's class; for torch.fx PyTorch's is a leaf module."""
        if isinstance(x, Proxy) and self.timm_class is nn.LayerNorm:
            tracer: Any = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        return super().unfused(x)

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weight, bias and eps, for an operation that bypasses the module."""
        return self.weight, self.bias, self.eps
