"""Attention in plain PyTorch: the definition of right."""

from torch import Tensor

from .. import _dispatch
from ..quantize import Quantized, quantize_reference, quantize_statically_reference


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """PyTorch's scaled_dot_product_attention in the kernels' layout.

    Arguments and result as those of `attention`; the result may be non-contiguous.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)
    return _dispatch.sdpa(q, k, v, mask, scale).transpose(1, 2)


def attention_quantized_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, format: str = "fp8",
    out_scale: Tensor | None = None, in_scale: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """`attention_reference` of dequantized operands, its result quantized.

    Arguments and result as those of `attention_quantized`.
    """
    if in_scale is not None:
        q, k, v = (t.float() * in_scale.view(()) for t in (q, k, v))
    o = attention_reference(q, k, v, scale)
    if out_scale is not None:
        return quantize_statically_reference(o.flatten(2), out_scale)
    return quantize_reference(o.flatten(2), format, parts=o.shape[2])
