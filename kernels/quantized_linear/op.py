"""The operator of `quantized_linear`, its argument checks, and the public function."""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _policy
from ..linear import ACTIVATIONS
from ..quantize import (
    Quantized,
    expect_float,
    expect_quantized,
    expect_scale,
    storage,
)
from .configs import GROUP_SIZE
from .forward import run
from .reference import quantized_linear_reference

MAX_K = (2**31 - 1) // 127**2  # of int8: int32 holds the sums
# Relative error of sm_90's FP8 sums, which have fewer bits than fp32, that is allowed beside the
# reference's.
SHORT_SUMS = 2e-3


def _alloc(x, weight, dtype, own_scales):
    """What forward returns: y, and its scales unless they were given. Also its fake."""
    M, N = x.shape[0], weight.shape[0]
    scales = (N // GROUP_SIZE, M) if own_scales else 0
    return x.new_empty(M, N, dtype=dtype), x.new_empty(scales, dtype=torch.float32)


@_dispatch.custom_op("deit_fast::quantized_linear")
def _fwd(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    out_scale: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    own_scales = dtype.itemsize == 1 and out_scale is None
    y, scales = made = _alloc(x, weight, dtype, own_scales)
    if y.numel():
        run(
            y, scales if own_scales else None, x, x_scales, weight, weight_scales, bias, residual,
            layer_scale, row_scale, out_scale, activation,
        )  # fmt: skip
    return made


@_fwd.register_fake
def _(x, xs, weight, ws, bias, residual, layer_scale, row_scale, out_scale, activation, dtype):
    return _alloc(x, weight, dtype, dtype.itemsize == 1 and out_scale is None)


@_fwd.register_flops
def _(x, x_scales, weight, *args, **kwargs):
    (M, K), N = x, weight[0]
    return 2 * M * N * K


def _expect_operands(op: str, x: Quantized, weight: Quantized) -> None:
    """Raise unless x (..., K) and weight (N, K) are what the kernel multiplies."""
    K, N = x.values.shape[-1], weight.values.shape[0]
    if weight.values.dtype != x.values.dtype:
        raise TypeError(f"{op}: weight has {weight.values.dtype}, expected x's {x.values.dtype}")
    if weight.values.dim() != 2 or weight.scales.shape != (1, N):
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.values.shape)} and scales "
            f"{tuple(weight.scales.shape)}, expected (N, {K}) and (1, N)"
        )
    groups = x.scales.shape[0]
    if groups > 1 and K // groups % 32:
        raise ValueError(f"{op}: x has groups of {K // groups} features, expected a multiple of 32")
    if N * K >= 2**31:
        raise ValueError(f"{op}: weight is {N} x {K}, expected fewer than 2**31 elements")
    if K > MAX_K and x.values.dtype == torch.int8:
        raise ValueError(
            f"{op}: x has {K} features, expected {MAX_K} at most: int32 holds their sums"
        )


def _expect_result(op, N, format, out, dtype, out_scale, extras):
    """Raise unless a result of N features can be float in `dtype`, or quantized to `out`."""
    if out is None and dtype not in _checks.DTYPES:
        raise TypeError(
            f"{op}: dtype {dtype}, expected float32, float16 or bfloat16 without a format"
        )
    if out is not None and (dtype is not None or any(t is not None for t in extras)):
        raise ValueError(
            f"{op}: format {format!r} with a dtype, residual, layer_scale or row_scale"
        )
    if out is not None and out_scale is None and N % GROUP_SIZE:
        raise ValueError(f"{op}: {N} features in {format!r}, expected a multiple of {GROUP_SIZE}")


@_dispatch.inference_only
def quantized_linear(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    format: str | None = None,
    out_scale: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor | Quantized:
    """`residual + row_scale * layer_scale * activation(x @ weight.T + bias)`, each part optional.

    Both operands are quantized, as `quantize` makes them; the result is float, or
    `activation(...)` quantized again. There is no gradient: backward raises.

    Args:
        x: (..., K), FP8 or INT8, with per-row scales, per-group scales (groups of a multiple of 32
            features) or, FP8 only, a per-tensor scale.
        weight: (N, K) in x's format, with per-row scales.
        bias: (N,) in fp32, fp16 or bf16, as the next three.
        activation: "none" or "gelu".
        residual: (..., N).
        layer_scale: (N,).
        row_scale: (S,) drop-path mask of the S samples along x's first dimension.
        dtype: Of a float result: fp32, fp16 or bf16.
        format: "fp8" or "int8", of a quantized result; `dtype`, residual, layer_scale and row_scale
            must then be None.
        out_scale: Static per-tensor scale of an FP8 result, (1, 1) in fp32. Without it the result
            has a scale for each 64 features of a row.
        implementation: "auto", "triton" or "torch".

    Returns:
        (..., N) in `dtype` promoted with the residual's; with `format` a Quantized.

    Raises:
        ValueError: For shapes, devices and names that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: Where the chip does not multiply this format.
    """
    op = "quantized_linear"
    expect_quantized(op, "x", x)
    K = x.values.shape[-1]
    expect_quantized(op, "weight", weight, K)
    chosen = _policy.resolve(op, x.values, implementation, dtype=x.values.dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r}, expected one of {ACTIVATIONS}")
    _expect_operands(op, x, weight)
    N, lead = weight.values.shape[0], x.values.shape[:-1]
    _checks.expect(
        op, x.values, weight=(weight.values, (N, K)), bias=(bias, (N,)),
        residual=(residual, (*lead, N)), layer_scale=(layer_scale, (N,)),
        row_scale=(row_scale, lead[:1]),
    )  # fmt: skip
    for name, t in (
        ("bias", bias), ("residual", residual), ("layer_scale", layer_scale),
        ("row_scale", row_scale),
    ):  # fmt: skip
        if t is not None:
            expect_float(op, name, t)
    out = storage(op, format)
    expect_scale(op, x.values, format, out_scale)
    extras = (residual, layer_scale, row_scale)
    _expect_result(op, N, format, out, dtype, out_scale, extras)
    if chosen == "torch":
        return quantized_linear_reference(
            x, weight, bias, activation, *extras, dtype, format, out_scale
        )
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)  # type: ignore[arg-type]  # checked above
        residual = residual.reshape(-1, N).contiguous()
    vectors = [t if t is None else t.contiguous() for t in (bias, residual, layer_scale, row_scale)]
    y, scales = _fwd(
        x.values.reshape(-1, K).contiguous(), x.scales.contiguous(), weight.values.contiguous(),
        weight.scales.contiguous(), *vectors, out_scale, activation, dtype if out is None else out,
    )  # fmt: skip
    y = y.view(*lead, N)
    if out is None:
        return y
    return Quantized(y, scales if out_scale is None else out_scale)
