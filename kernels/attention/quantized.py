"""Quantized attention for inference: o in FP8 or INT8, and q, k and v in FP8 where qkv wrote that.

The kernels are those of `forward.py`: they quantize as they store, from fp32.
"""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _policy
from ..quantize import Quantized, expect_float, expect_scale, storage
from .forward import run
from .op import checked, flops, kernel_operands
from .reference import attention_quantized_reference


def _alloc(q, dtype, out_scale):
    """What forward returns: o, and its scales unless they were given. Also its fake."""
    B, N, H, _ = q.shape
    scales = (H, B * N) if out_scale is None else 0
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(scales, dtype=torch.float32)


@_dispatch.custom_op("deit_fast::attention_quantized")
def _fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, out_scale: Tensor | None,
    in_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, scales = _alloc(q, dtype, out_scale)
    if o.numel():
        per_head = out_scale is None
        run(
            o, q, k, v, scale, scales=scales if per_head else out_scale, per_head=per_head,
            in_scale=in_scale,
        )  # fmt: skip
    return o, scales


@_fwd.register_fake
def _(q, k, v, scale, dtype, out_scale, in_scale):
    return _alloc(q, dtype, out_scale)


_fwd.register_flops(flops)


@_dispatch.inference_only
def attention_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    format: str = "fp8",
    out_scale: Tensor | None = None,
    in_scale: Tensor | None = None,
    implementation: str = "auto",
) -> Quantized:
    """`attention(q, k, v, scale)`, its result quantized for `quantized_linear`.

    Scores, softmax and sums are fp32, as in `attention`. No gradient: backward raises.

    Args:
        q: Queries (B, N, H, d) as `attention` takes them, or float8_e4m3fn with an `in_scale`.
        k: Keys (B, L, H, d), in q's dtype.
        v: Values (B, L, H, d), in q's dtype.
        scale: Of the scores q k^T; default 1 / sqrt(d). Positive with an `in_scale`.
        format: "fp8" | "int8", of the result.
        out_scale: Per-tensor scale (1, 1) in fp32 of an FP8 result. Without it each row of each
            head gets its own.
        in_scale: Per-tensor scale (1, 1) in fp32 of FP8 q, k and v. Both matmuls are then FP8, and
            the softmax weights are rounded to FP8 too.
        implementation: "auto" | "triton" | "torch".

    Returns:
        Values (B, N, H * d) and scales: per head and row, (H, B N), or `out_scale`.

    Raises:
        ValueError: As `attention`, and for formats and scales that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: If the chip does not have the format.
    """
    op = "attention_quantized"
    dtype = storage(op, format)
    if in_scale is None:
        expect_float(op, "q", q)
    else:
        _checks.expect(op, q, torch.float32, in_scale=(in_scale, (1, 1)))
        if q.dtype != torch.float8_e4m3fn or dtype != q.dtype:
            raise TypeError(
                f"{op}: in_scale with a q of {q.dtype} and format {format!r}, "
                "expected float8_e4m3fn and 'fp8'"
            )
        if scale is not None and scale <= 0:
            raise ValueError(f"{op}: scale {scale} with in_scale, expected a positive one")
    chosen = _policy.resolve(op, q, implementation, dtype=dtype)
    q, k, v, scale = checked(q, k, v, scale)
    expect_scale(op, q, format, out_scale)
    if chosen == "torch":
        return attention_quantized_reference(q, k, v, scale, format, out_scale, in_scale)
    o, scales = _fwd(*kernel_operands(q, k, v, scale), dtype, out_scale, in_scale)
    return Quantized(o.flatten(2), scales if out_scale is None else out_scale)
