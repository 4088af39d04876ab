"""The plain PyTorch reference of `quantized_linear`: the definition of right."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from ..quantize import (
    Quantized,
    dequantize,
    quantize_reference,
    quantize_statically_reference,
)
from .configs import GROUP_SIZE


def quantized_linear_reference(
    x: Quantized, weight: Quantized, bias: Tensor | None = None, activation: str = "none",
    residual: Tensor | None = None, layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None, dtype: torch.dtype | None = None,
    format: str | None = None, out_scale: Tensor | None = None,
) -> Tensor | Quantized:  # fmt: skip
    """What `quantized_linear` computes, in fp32 on the dequantized operands.

    The arguments are those of `quantized_linear`.
    """
    with _checks.without_autocast(x.values):  # fp32, as the kernel
        y = F.linear(dequantize(x), weight.values.float()) * weight.scales.view(-1)
    if bias is not None:
        y = y + bias.float()
    if activation == "gelu":
        y = F.gelu(y)
    if out_scale is not None or format is not None:
        return quantize_result(y, format, out_scale)
    if layer_scale is not None:
        y = y * layer_scale.float()
    if row_scale is not None:
        y = y * row_scale.float().view(-1, *(1,) * (y.dim() - 1))
    if residual is not None:
        y = y + residual.float()
        dtype = torch.promote_types(dtype, residual.dtype)  # type: ignore[arg-type]  # a float result has one
    return y.to(dtype)


def quantize_result(y: Tensor, format: str | None, out_scale: Tensor | None) -> Quantized:
    """Quantize y as the operation does: by `out_scale`, or with a scale for each group.

    Args:
        y: (..., N) in fp32.
        format: "fp8" or "int8".
        out_scale: Per-tensor scale, (1, 1) in fp32.
    """
    if out_scale is not None:
        return quantize_statically_reference(y, out_scale)
    assert format is not None  # checked by the caller
    return quantize_reference(y, format, y.shape[-1] // GROUP_SIZE)
