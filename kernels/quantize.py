"""Rows in eight bits: values and what to multiply them by.

    scale[p, m] = max |x[m, part p]| / Q          Q = 448 ("fp8": e4m3) or 127 ("int8")
    q           = round(x / scale), within [-Q, Q]                     x is about q * scale

M rows of K features in P equal parts: x (M, K), q (M, K), scale (P, M) in fp32, from fp32
arithmetic, rounded to nearest even. Or one scale for all, (1, 1), given beforehand: what is larger
than Q times it saturates. A weight (N, K) is quantised in the same way: a scale for each output.

A scale is never 0 or NaN. It is at least the smallest normal number of fp32, so zeros stay zeros.
Where a part is not finite its scale is infinite and its values are 0: 0 * inf is NaN, and a row
that was not a number stays none, which int8 has no other way to say. For the same reason one scale
for all is e4m3's alone, which has a NaN: for infinity too.

`quantize` is a pass of its own. It is not how a model is served: LayerNorm, GELU's epilogue and
attention write eight bits themselves, with the functions below.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _dispatch, _policy

FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
TINY = torch.finfo(torch.float32).tiny
MAX_WIDTH = 8192  # of a part: it is held in registers


class Quantized(NamedTuple):
    """values (..., K) in float8_e4m3fn or int8; scales (P, rows) or (1, 1) in fp32."""

    values: Tensor
    scales: Tensor


def quantize_reference(x, format="fp8", parts=1):
    dtype = FORMATS[format]
    h = x.float().unflatten(-1, (parts, -1))
    largest = h.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    scale = (largest / LIMITS[dtype]).clamp_min(TINY)
    values = round_reference(torch.where(finite, h / scale, 0.0), dtype).flatten(-2)
    scale = torch.where(finite, scale, torch.inf)
    return Quantized(values, scale.reshape(-1, parts).t().contiguous())


def round_reference(x, dtype):
    """x in fp32 to the nearest that `dtype` has; the largest for what is beyond."""
    x = x.clamp(-LIMITS[dtype], LIMITS[dtype])
    return (x.round() if dtype == torch.int8 else x).to(dtype)


def quantize_statically_reference(x, scale):
    """e4m3 by one scale (1, 1) for all."""
    x = x.float()
    return Quantized(round_reference(x / scale.view(()) + 0.0 * x, torch.float8_e4m3fn), scale)


def dequantize(q: Quantized) -> Tensor:
    """values * scales in fp32, (..., K)."""
    values = q.values.float()
    if q.scales.numel() == 1:
        return values * q.scales.view(())
    parts = q.scales.shape[0]
    scales = q.scales.t().reshape(*values.shape[:-1], parts, 1)
    return (values.unflatten(-1, (parts, -1)) * scales).flatten(-2)


@triton.jit
def _scales(x, INT8: tl.constexpr):
    """Scales of the parts along the last axis of x, and what to multiply x by. The largest is taken
    of the bits, which order NaN behind infinity, and both behind all that is finite."""
    limit = 127.0 if INT8 else 448.0
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=len(x.shape) - 1)
    finite = bits < 0x7F800000
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.where(finite, largest, 0.0) / limit, 1.1754943508222875e-38)
    return tl.where(finite, scale, float("inf")), tl.where(finite, 1.0 / scale, 0.0)


@triton.jit
def _round(x, inverse, INT8: tl.constexpr):
    """x * inverse to the nearest of eight bits; `inverse` of 0 gives 0, whatever x is."""
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
    # int64: M * K may pass 2**31. A row of this program is a part of x's, K = P * WIDTH
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
    """Tile and warps by rule, LayerNorm's too: 4 warps share about a thousand features; wide rows
    get more, so that no thread holds more than 16. A row kernel has nothing else to tune."""
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
            _quantize_kernel[(_dispatch.cdiv(M * parts, config["BLOCK_M"]),)](
                x, values, scales, M, parts, width, INT8=dtype == torch.int8, **config
            )
    return values, scales


@_fwd.register_fake
def _(x, dtype, parts):
    return _alloc(x, dtype, parts)


_fwd.register_flops(_dispatch.no_flops)


def storage(op: str, format: str | None) -> torch.dtype | None:
    """The dtype of a format's values; None stays None. Raises ValueError for an unknown name."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"{op}: format {format!r}, expected one of {tuple(FORMATS)}")
    return format and FORMATS[format]


def expect_float(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError unless x is in one of the dtypes that the kernels round to eight bits."""
    if x.dtype not in _checks.DTYPES:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected float32, float16 or bfloat16")


def expect_scale(op: str, x: Tensor, format: str | None, out_scale: Tensor | None) -> None:
    """Raise ValueError or TypeError unless `out_scale` is None, or one scale for values in e4m3."""
    if out_scale is None:
        return
    if format != "fp8":
        raise ValueError(
            f"{op}: out_scale with format {format!r}, expected 'fp8': int8 could not say NaN"
        )
    _checks.expect(op, x, torch.float32, out_scale=(out_scale, (1, 1)))


def expect_quantized(op: str, name: str, q: Quantized, features: int | None = None) -> None:
    """Raise unless `q` is what `quantize` returns, of rows of `features`."""
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
    one = q.scales.shape == (1, 1) and q.values.dtype == torch.float8_e4m3fn
    parts = q.scales.shape[0] if q.scales.dim() == 2 else 0
    if not one and (parts < 1 or q.scales.shape[1] != rows or shape[-1] % parts):
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
    """Rows in eight bits, each part of each with its own scale, in one pass.

    x (..., K) in fp32, fp16 or bf16; `format` "fp8" | "int8"; K a multiple of `parts`, K / parts at
    most 8192. Returns values (..., K) and scales (parts, rows) in fp32. No gradient: backward
    raises. `implementation`: "auto" | "triton" | "torch". Raises ValueError for shapes and names,
    TypeError for dtypes, RuntimeError where the chip has no such numbers.
    """
    dtype = storage("quantize", format)
    expect_float("quantize", "x", x)
    K = x.shape[-1] if x.dim() else 0
    if parts < 1 or K < 1 or K % parts or K // parts > MAX_WIDTH:
        raise ValueError(
            f"quantize: x has shape {tuple(x.shape)} and parts is {parts}, expected (..., K) with K a "
            f"multiple of parts and parts of at most {MAX_WIDTH}"
        )
    if _policy.resolve("quantize", x, implementation, dtype=dtype) == "torch":
        return quantize_reference(x, format, parts)
    values, scales = _fwd(x.reshape(-1, K).contiguous(), dtype, parts)
    return Quantized(values.view(x.shape), scales)
