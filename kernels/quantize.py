"""Quantization of rows to FP8 (e4m3) or INT8, with per-row or per-group scales.

    scale[p, m] = max |x[m, group p]| / Q         Q = 448 ("fp8": e4m3) or 127 ("int8")
    q           = round(x / scale), within [-Q, Q]                     x is about q * scale

M rows of K features in P equal groups (the argument `parts`; 1: per-row scales): x and q (M, K),
scale (P, M) in fp32, from fp32 arithmetic, rounded to nearest even. Or a static per-tensor scale
(1, 1), given beforehand: what is larger than Q times it saturates. A weight (N, K) is quantized in
the same way: a scale for each output feature.

A scale is never 0 or NaN. It is at least the smallest normal number of fp32, so zeros stay zeros.
Where a group is not finite its scale is infinite and its values are 0: 0 * inf is NaN, so that the
row stays NaN, for which int8 has no value. For the same reason only e4m3, which has a NaN, takes a
per-tensor scale: NaN and infinity become its NaN.

`quantize` is a kernel of its own. A model does not use it for activations: LayerNorm, GELU's
epilogue and attention write quantized outputs themselves, with the functions below.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _dispatch, _plans, _policy

FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # Q
TINY = torch.finfo(torch.float32).tiny
MAX_WIDTH = 8192  # of a group: it is held in registers


class Quantized(NamedTuple):
    """A quantized tensor.

    Attributes:
        values: (..., K) in float8_e4m3fn or int8.
        scales: (P, rows), or (1, 1) per tensor, in fp32.
    """

    values: Tensor
    scales: Tensor


def quantize_reference(x: Tensor, format: str = "fp8", parts: int = 1) -> Quantized:
    """`quantize` in PyTorch's operations: the definition of right."""
    dtype = FORMATS[format]
    h = x.float().unflatten(-1, (parts, -1))
    largest = h.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    scale = (largest / LIMITS[dtype]).clamp_min(TINY)
    values = round_reference(torch.where(finite, h / scale, 0.0), dtype).flatten(-2)
    scale = torch.where(finite, scale, torch.inf)
    return Quantized(values, scale.reshape(-1, parts).t().contiguous())


def round_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 x to the nearest number of `dtype`; what is beyond its range saturates."""
    x = x.clamp(-LIMITS[dtype], LIMITS[dtype])
    return (x.round() if dtype == torch.int8 else x).to(dtype)


def quantize_statically_reference(x: Tensor, scale: Tensor) -> Quantized:
    """Quantize x to e4m3 with a static per-tensor scale (1, 1)."""
    x = x.float()
    return Quantized(round_reference(x / scale.view(()) + 0.0 * x, torch.float8_e4m3fn), scale)


def dequantize(q: Quantized) -> Tensor:
    """`values * scales` in fp32, (..., K)."""
    values = q.values.float()
    if q.scales.numel() == 1:
        return values * q.scales.view(())
    parts = q.scales.shape[0]
    scales = q.scales.t().reshape(*values.shape[:-1], parts, 1)
    return (values.unflatten(-1, (parts, -1)) * scales).flatten(-2)


@triton.jit
def _scales(x, INT8: tl.constexpr):
    """Scales of the groups along the last axis of x, and the factors that x is multiplied by.

    The maximum is taken of the bits, which order NaN after infinity, and both after every finite
    number.
    """
    limit = 127.0 if INT8 else 448.0
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=len(x.shape) - 1)
    finite = bits < 0x7F800000
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.where(finite, largest, 0.0) / limit, 1.1754943508222875e-38)
    return tl.where(finite, scale, float("inf")), tl.where(finite, 1.0 / scale, 0.0)


@triton.jit
def _round(x, inverse, INT8: tl.constexpr):
    """Round x * inverse to the quantized format; an `inverse` of 0 gives 0, whatever x is."""
    if INT8:
        # 1.5 * 2^23 leaves the integer, to the nearest, in the lowest bits
        x = tl.clamp(tl.where(inverse == 0.0, 0.0, x * inverse), -127.0, 127.0)
        rounded = (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        # 0 times infinity makes it NaN
        x = tl.where(inverse == 0.0, 0.0, x * inverse + 0.0 * x)
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        rounded = x.to(tl.float8e4nv)
    return rounded


@triton.jit
def _quantize_kernel(
    x_ptr,  # in: (M, K)
    q_ptr, scales_ptr,  # out: (M, K) (P, M)
    M, P, WIDTH, INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # int64: M * K may exceed 2**31. A row here is a group of a row of x, K = P * WIDTH
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows = rows < M * tl.cast(P, tl.int64)
    mask = in_rows[:, None] & (cols < WIDTH)[None, :]
    offs = rows[:, None] * WIDTH + cols[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scales, inverse = _scales(x, INT8)
    tl.store(q_ptr + offs, _round(x, inverse[:, None], INT8), mask=mask)
    tl.store(scales_ptr + rows % P * M + rows // P, scales, mask=in_rows)


@cache
def meta(N: int) -> dict:
    """Tile and warps by rule, for LayerNorm too.

    4 warps share about a thousand features. Wide rows get more, so that no thread holds more than
    16. A row kernel has nothing else to tune.
    """
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_M = max(1024 // BLOCK_N, 1)
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": max(4, BLOCK_N // 512)}


def _alloc(x, dtype, parts):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(parts, x.shape[0], dtype=torch.float32)


@_dispatch.custom_op("deit_fast::quantize")
def _fwd(x: Tensor, dtype: torch.dtype, parts: int) -> tuple[Tensor, Tensor]:
    values, scales = _alloc(x, dtype, parts)
    if values.numel():
        M, width = x.shape[0], x.shape[1] // parts
        config = meta(width)
        with torch.cuda.device_of(x):
            _plans.launch(
                _quantize_kernel, (_dispatch.cdiv(M * parts, config["BLOCK_M"]),),
                x, values, scales, M, parts, width, INT8=dtype == torch.int8, **config,
            )  # fmt: skip
    return values, scales


@_fwd.register_fake
def _(x, dtype, parts):
    return _alloc(x, dtype, parts)


_fwd.register_flops(_dispatch.no_flops)


def storage(op: str, format: str | None) -> torch.dtype | None:
    """The dtype of a format's values; None stays None.

    Raises:
        ValueError: For an unknown name.
    """
    if format is None:
        return None
    if format not in FORMATS:
        raise ValueError(f"{op}: format {format!r}, expected one of {tuple(FORMATS)}")
    return FORMATS[format]


def expect_float(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError unless x has one of the dtypes that the kernels quantize."""
    if x.dtype not in _checks.DTYPES:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected float32, float16 or bfloat16")


def expect_scale(op: str, x: Tensor, format: str | None, out_scale: Tensor | None) -> None:
    """Raise ValueError or TypeError unless `out_scale` is None, or a per-tensor scale for e4m3."""
    if out_scale is None:
        return
    if format != "fp8":
        raise ValueError(
            f"{op}: out_scale with format {format!r}, expected 'fp8': int8 could not say NaN"
        )
    _checks.expect(op, x, torch.float32, out_scale=(out_scale, (1, 1)))


def expect_quantized(op: str, name: str, q: Quantized, features: int | None = None) -> None:
    """Check that `q` is what `quantize` returns, of rows of `features`.

    Raises:
        TypeError: For another type or dtypes.
        ValueError: For shapes or devices that do not fit.
    """
    if not isinstance(q, Quantized):
        raise TypeError(f"{op}: {name} is a {type(q).__name__}, expected a Quantized")
    if q.values.dtype not in LIMITS or q.scales.dtype != torch.float32:
        raise TypeError(
            f"{op}: {name} has values of {q.values.dtype} and scales of {q.scales.dtype}, "
            "expected float8_e4m3fn or int8, and float32"
        )
    shape = tuple(q.values.shape)
    if not shape or features is not None and shape[-1] != features:
        raise ValueError(
            f"{op}: {name} has values of shape {shape}, expected (..., {features or 'K'})"
        )
    rows = q.values.numel() // max(shape[-1], 1)
    per_tensor = q.scales.shape == (1, 1) and q.values.dtype == torch.float8_e4m3fn
    parts = q.scales.shape[0] if q.scales.dim() == 2 else 0
    if not per_tensor and (parts < 1 or q.scales.shape[1] != rows or shape[-1] % parts):
        raise ValueError(
            f"{op}: {name} has scales of shape {tuple(q.scales.shape)} for values of {shape}, "
            f"expected (P, {rows}), P a divisor of {shape[-1]}, or (1, 1) with fp8"
        )
    if q.scales.device != q.values.device:
        raise ValueError(
            f"{op}: {name} has scales on {q.scales.device}, expected {q.values.device}"
        )


@_dispatch.inference_only
def quantize(
    x: Tensor, format: str = "fp8", parts: int = 1, implementation: str = "auto"
) -> Quantized:
    """Quantize rows, with a scale for each row or each group of a row.

    For inference: backward raises.

    Args:
        x: (..., K) in fp32, fp16 or bf16.
        format: "fp8" (e4m3) | "int8".
        parts: Equal groups of a row; a divisor of K, K / parts is 8192 at most.
        implementation: "auto" | "triton" | "torch".

    Returns:
        Values (..., K) and scales (parts, rows) in fp32.

    Raises:
        ValueError: For shapes and names that do not fit.
        TypeError: For another dtype of x.
        RuntimeError: Where the chip has no such format.
    """
    dtype = storage("quantize", format)
    expect_float("quantize", "x", x)
    K = x.shape[-1] if x.dim() else 0
    if parts < 1 or K < 1 or K % parts or K // parts > MAX_WIDTH:
        raise ValueError(
            f"quantize: x has shape {tuple(x.shape)} and parts is {parts}, expected (..., K) with "
            f"K a multiple of parts and K / parts of at most {MAX_WIDTH}"
        )
    if _policy.resolve("quantize", x, implementation, dtype=dtype) == "torch":
        return quantize_reference(x, format, parts)
    values, scales = _fwd(x.reshape(-1, K).contiguous(), dtype, parts)
    return Quantized(values.view(x.shape), scales)
