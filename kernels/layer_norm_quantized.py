"""LayerNorm whose result is quantized, with per-row scales, in the same kernel.

    y     = layer_norm(x)                  in fp32, see layer_norm
    q, s  = quantize(y)                    see quantize

The fp32 y is quantized, so it is rounded once. For inference. M rows, N features: x and q (M, N),
scales (1, M) in fp32.
"""

import torch
from torch import Tensor

from . import _dispatch, _policy
from .layer_norm import check_operands, contiguous_operands, layer_norm_reference, run
from .quantize import Quantized, _alloc, expect_float, quantize_reference, storage


def layer_norm_quantized_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, format: str = "fp8"
) -> Quantized:
    """`layer_norm_quantized` in PyTorch's operations: the definition of right."""
    return quantize_reference(
        layer_norm_reference(x.float(), weight.float(), bias.float(), eps), format
    )


@_dispatch.custom_op("deit_fast::layer_norm_quantized")
def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, scales = _alloc(x, dtype, 1)
    run(y, x, weight, bias, eps, scales=scales)
    return y, scales


@_fwd.register_fake
def _(x, weight, bias, eps, dtype):
    return _alloc(x, dtype, 1)


_fwd.register_flops(_dispatch.no_flops)


@_dispatch.inference_only
def layer_norm_quantized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    format: str = "fp8",
    implementation: str = "auto",
) -> Quantized:
    """`quantize(layer_norm(x), format)` in one kernel: what `quantized_linear` reads.

    For inference: backward raises.

    Args:
        x: (..., N), N <= 8192. It and the others in fp32, fp16 or bf16, mixed freely.
        weight: (N,).
        bias: (N,).
        eps: Added to the variance.
        format: "fp8" (e4m3) | "int8".
        implementation: "auto" | "triton" | "torch".

    Returns:
        Values (..., N) and per-row scales (1, rows) in fp32.

    Raises:
        ValueError: For shapes, devices and names that do not fit.
        TypeError: For another dtype of x.
        RuntimeError: Where the chip has no such format.
    """
    dtype = storage("layer_norm_quantized", format)
    expect_float("layer_norm_quantized", "x", x)
    chosen = _policy.resolve("layer_norm_quantized", x, implementation, dtype=dtype)
    check_operands("layer_norm_quantized", x, None, weight, bias)
    if chosen == "torch":
        return layer_norm_quantized_reference(x, weight, bias, eps, format)
    x2, _, weight, bias = contiguous_operands(x, None, weight, bias)
    values, scales = _fwd(x2, weight, bias, eps, dtype)
    return Quantized(values.view(x.shape), scales)
