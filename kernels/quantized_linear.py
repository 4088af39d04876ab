"""Linear layer with both operands in eight bits, and its result too if the next one reads that.

    z = (xq @ wq^T) * xs * ws + b            xq, xs and wq, ws: values and scales, see quantize
    y = residual + row_scale * layer_scale * a,      a = z or gelu(z)
    or y = quantize(a), with the scales of its rows or by one that is given

The scale of a weight (N, K) belongs to a row of it, so to a column of the product: ws (1, N). That
of x (M, K) belongs to a row, xs (1, M), or to all, (1, 1), and is then left to the epilogue as ws
is; or to a row and each of P equal parts of its features, (P, M), and is then multiplied with each
part's share of the product:

    z = sum_p xs[p] * (xq[:, p] @ wq[:, p]^T) * ws + b

LayerNorm holds whole rows and gives them one scale. A tile of GELU's results has 64 columns of a
row, a program of attention one head: so the result of this operation has a scale for each 64
columns, unless it is given one.

M rows, K input features, N output features, S samples. int8 products are exact in int32. fp8 ones
accumulate on the tensor cores: in fp32 on sm_89, with the fewer bits of its fp8 instruction on
sm_90. From there on all is fp32 until y is rounded, once. GELU as in linear. Inference only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _checks, _chips, _dispatch, _policy, _tuned
from .linear import ACTIVATIONS, _aligned, _config, _epilogue, _gelu, _tile, _without_tma
from .quantize import (
    Quantized,
    _round,
    _scales,
    dequantize,
    expect_float,
    expect_quantized,
    expect_scale,
    quantize_reference,
    quantize_statically_reference,
    storage,
)

PART = 64  # columns of a result that share a scale
MAX_K = (2**31 - 1) // 127**2  # of int8
SHORT_SUMS = 2e-3  # that sm_90's fp8 may err relatively beside fp32's: its sums have fewer bits


def quantized_linear_reference(
    x, weight, bias=None, activation="none", residual=None, layer_scale=None, row_scale=None,
    dtype=None, format=None, out_scale=None,
):  # fmt: skip
    with _checks.without_autocast(x.values):  # fp32, as the kernel
        y = F.linear(dequantize(x), weight.values.float()) * weight.scales.view(-1)
    if bias is not None:
        y = y + bias.float()
    if activation == "gelu":
        y = F.gelu(y)
    if out_scale is not None:
        return quantize_statically_reference(y, out_scale)
    if format is not None:
        return quantize_reference(y, format, y.shape[-1] // PART)
    if layer_scale is not None:
        y = y * layer_scale.float()
    if row_scale is not None:
        y = y * row_scale.float().view(-1, *(1,) * (y.dim() - 1))
    if residual is not None:
        y, dtype = y + residual.float(), torch.promote_types(dtype, residual.dtype)
    return y.to(dtype)


@triton.jit
def _scaled_product(
    x_ptr, xs_ptr, w_ptr, first_row, left, first_col, M, N, K, PARTS: tl.constexpr,
    INT8: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """xq @ wq^T of one tile, in fp32; of several parts, each times its scale."""
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    cols = first_col + tl.arange(0, BLOCK_N)
    # Rows and columns outside read the first ones and are not stored: no mask in the loop.
    safe_rows = tl.where(rows < left, rows, 0)
    if not TMA:
        safe_cols = tl.where(cols < N, cols, 0)
        x_ptrs = x_ptr + first_row.to(tl.int64) * K + (safe_rows[:, None] * K + ks[None, :])
        w_ptrs = w_ptr + (safe_cols[None, :] * K + ks[:, None])
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM if PARTS == 1 else tl.float32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            x, w = x_ptr.load([first_row, k]), w_ptr.load([first_col, k]).T
        elif EVEN_K:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k + ks < K)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k + ks < K)[:, None], other=0.0)
        if PARTS == 1:
            acc = tl.dot(x, w, acc, out_dtype=SUM)
        else:
            part = tl.cast(k // (K // PARTS), tl.int64)  # PARTS * M may pass 2**31
            scale = tl.load(xs_ptr + part * M + first_row + safe_rows)
            acc += tl.dot(x, w, out_dtype=SUM).to(tl.float32) * scale[:, None]
        if not TMA:
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
    return acc.to(tl.float32)


@triton.jit
def _quantized_epilogue(
    acc, first_row, left, first_col, b_ptr, y_ptr, ys_ptr, M, N, ACTIVATION: tl.constexpr,
    OWN_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile of y in eight bits, with its scales or by the one there is."""
    INT8: tl.constexpr = y_ptr.dtype.element_ty == tl.int8
    PART: tl.constexpr = 64
    rows, cols = tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < left, cols < N
    if b_ptr is not None:
        acc += tl.load(b_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        acc = _gelu(acc, False)
    if OWN_SCALE:
        parts = first_col // PART + tl.arange(0, BLOCK_N // PART)
        h = tl.reshape(acc, (BLOCK_M, BLOCK_N // PART, PART))
        scales, inverse = _scales(h, INT8)
        ptrs = ys_ptr + parts[None, :].to(tl.int64) * M + (first_row + rows)[:, None]
        tl.store(ptrs, scales, mask=in_rows[:, None] & (parts * PART < N)[None, :])
        y = tl.reshape(_round(h, inverse[:, :, None], INT8), (BLOCK_M, BLOCK_N))
    else:
        y = _round(acc, 1.0 / tl.load(ys_ptr), INT8)
    y_ptr += first_row.to(tl.int64) * N
    mask = in_rows[:, None] & in_cols[None, :]
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)


@triton.jit
def _finish(
    acc, first_row, left, first_col, ws_ptr, vectors, res_ptr, y_ptr, ys_ptr, M, N,
    rows_per_sample, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, OWN_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = first_col + tl.arange(0, BLOCK_N)
    acc *= tl.load(ws_ptr + cols, mask=cols < N, other=0.0)[None, :]
    b_ptr, ls_ptr, rs_ptr = vectors
    if ys_ptr is not None:
        _quantized_epilogue(
            acc, first_row, left, first_col, b_ptr, y_ptr, ys_ptr, M, N, ACTIVATION, OWN_SCALE,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _epilogue(
            acc, first_row, left, first_col, (b_ptr, ls_ptr, rs_ptr, None, None, None), res_ptr,
            y_ptr, None, (None, None, None), M, N, rows_per_sample, ACTIVATION, EXACT,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _quantized_linear_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr,  # in: (M, K), (PARTS, M) or (1, 1); (N, K), (1, N)
    b_ptr, res_ptr, ls_ptr, rs_ptr,  # in: (N,) (M, N) (N,) (S,), or None
    y_ptr,  # out: (M, N)
    ys_ptr,  # of a y in eight bits: (N / 64, M), out, or (1, 1), in; else None
    M, N, K, rows_per_sample,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr, BY_ROW: tl.constexpr,
    OWN_SCALE: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
    INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row, left, first_col = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    acc = _scaled_product(
        x_ptr, xs_ptr, w_ptr, first_row, left, first_col, M, N, K, PARTS, INT8, EVEN_K, TMA,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if PARTS == 1 and BY_ROW:
        rows = tl.arange(0, BLOCK_M)
        acc *= tl.load(xs_ptr + first_row + rows, mask=rows < left, other=0.0)[:, None]
    elif PARTS == 1:
        acc *= tl.load(xs_ptr)
    vectors = (b_ptr, ls_ptr, rs_ptr)
    if SPLIT:  # half the columns at a time: the epilogue then fits in the registers of two CTAs
        HALF: tl.constexpr = BLOCK_N // 2
        left_acc, right_acc = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        _finish(
            left_acc, first_row, left, first_col, ws_ptr, vectors, res_ptr, y_ptr, ys_ptr, M, N,
            rows_per_sample, ACTIVATION, EXACT, OWN_SCALE, BLOCK_M, HALF,
        )  # fmt: skip
        _finish(
            right_acc, first_row, left, first_col + HALF, ws_ptr, vectors, res_ptr, y_ptr, ys_ptr,
            M, N, rows_per_sample, ACTIVATION, EXACT, OWN_SCALE, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        _finish(
            acc, first_row, left, first_col, ws_ptr, vectors, res_ptr, y_ptr, ys_ptr, M, N,
            rows_per_sample, ACTIVATION, EXACT, OWN_SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def _configuration(m, n, k, warps, stages, tma=False, split=False):
    config = _config(m, n, k, warps, stages, tma=tma, split=split)
    return {name: value for name, value in config.items() if name != "PERSISTENT"}


# As linear's, with twice the features a step: as many bytes. In order the rule's three, of which
# the first leaves room for two CTAs a multiprocessor, the second for three. Scales within the
# product's loop (parts) take registers for a second sum: of tiles wider than 64 columns it spills
# (128x256 on sm_90, 64x128 on sm_80) or leaves room for one CTA.
HOPPER_CONFIGS = [
    _configuration(128, 128, 128, 8, 3, tma=True, split=True),
    _configuration(128, 64, 128, 4, 3, tma=True),
    _configuration(64, 32, 128, 4, 4),  # few rows
    _configuration(128, 256, 128, 8, 3, tma=True, split=True),
    _configuration(128, 128, 128, 8, 3, split=True),
    _configuration(128, 64, 128, 4, 3),
]
AMPERE_CONFIGS = [
    _configuration(64, 128, 128, 4, 3, split=True),
    _configuration(128, 64, 64, 4, 4),
    _configuration(64, 32, 128, 4, 4),
]


def configs(capability: tuple[int, int]) -> list[dict]:
    """Every configuration that a tuned table may name."""
    return HOPPER_CONFIGS if _chips.is_datacenter(capability) else AMPERE_CONFIGS


def epilogue_name(parts, activation, bias, residual, scaled, own_scale, quantized) -> str:
    """What surrounds the product, as tuned tables write it: "bias+gelu+quantized"."""
    present = {
        "parts": parts, "bias": bias, activation: activation != "none", "scales": scaled,
        "residual": residual, "quantized": quantized, "own_scales": own_scale,
    }  # fmt: skip
    return "+".join(name for name, there in present.items() if there)


@_tuned.validates("quantized_linear")
def why_not(shape, choice, capability):
    epilogue = str(shape.get("epilogue"))
    if "own_scales" in epilogue and choice.get("BLOCK_N", PART) < PART:
        return f"a tile narrower than the {PART} columns that share a scale"
    if "parts" in epilogue and choice.get("BLOCK_N", PART) > PART:
        return f"a tile of x's parts wider than {PART} columns, whose second sum spills"
    return _tuned.check_choice(choice, ("triton",), configs(capability))


def meta(
    M: int, N: int, capability: tuple[int, int], num_sms: int, parts: bool = False,
    own_scales: bool = False,
) -> dict:  # fmt: skip
    """The configuration for a shape that no table lists: the first of the chip's three that leaves
    no tile half empty and every multiprocessor with one."""
    wide, narrow, small = configs(capability)[:3]
    wide_fits = N % wide["BLOCK_N"] == 0 and not parts
    for config in (wide, narrow) if wide_fits else (narrow,):
        if _dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"]) >= num_sms:
            return config
    return narrow if own_scales else small


def block_k(config: dict, width: int) -> int:
    """Features a step: what the configuration says, or the power of two that divides a part."""
    return min(config["BLOCK_K"], width & -width)


def lookup_shape(
    x, x_scales, weight, weight_scales, bias, residual, layer_scale, row_scale, out_scale,
    activation, dtype,
):  # fmt: skip
    """What a tuned table goes by, of the operator's arguments."""
    quantized = dtype.itemsize == 1
    epilogue = epilogue_name(
        x_scales.shape[0] > 1, activation, bias is not None, residual is not None,
        layer_scale is not None or row_scale is not None, quantized and out_scale is None,
        quantized,
    )  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    format = "int8" if x.dtype == torch.int8 else "fp8"
    return {"M": M, "K": K, "N": N, "dtype": format, "epilogue": epilogue}


def _choose(shape, device, parts, own_scales):
    chip = _chips.chip(device)
    found = _tuned.lookup("quantized_linear", shape, chip)
    if found is not None:
        return {k: v for k, v in found.items() if k != "implementation"}
    return meta(shape["M"], shape["N"], chip.capability, chip.num_sms, parts, own_scales)


def _alloc(x, weight, dtype, own_scales):
    """What forward returns: y, and its scales unless they were given. Also its fake."""
    M, N = x.shape[0], weight.shape[0]
    scales = (N // PART, M) if own_scales else 0
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
    quantized = dtype.itemsize == 1
    own_scales = quantized and out_scale is None
    y, scales = made = _alloc(x, weight, dtype, own_scales)
    if not y.numel():
        return made
    (M, K), N = x.shape, weight.shape[0]
    by_row = x_scales.numel() > 1 or M == 1
    parts = x_scales.shape[0]
    shape = lookup_shape(
        x, x_scales, weight, weight_scales, bias, residual, layer_scale, row_scale, out_scale,
        activation, dtype,
    )  # fmt: skip
    config = _choose(shape, x.device, parts > 1, own_scales)
    if K % 16 or not _aligned(x, weight):
        config = _without_tma(config, HOPPER_CONFIGS)
    config = config | {"BLOCK_K": block_k(config, K // parts) if parts > 1 else config["BLOCK_K"]}
    x_arg, w_arg = x, weight
    if config["TMA"]:
        x_arg = TensorDescriptor.from_tensor(x, [config["BLOCK_M"], config["BLOCK_K"]])
        w_arg = TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
    tiles = _dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"])
    with torch.cuda.device_of(x):
        _quantized_linear_kernel[(tiles,)](
            x_arg, x_scales, w_arg, weight_scales, bias, residual, layer_scale, row_scale, y,
            (scales if own_scales else out_scale) if quantized else None,
            M, N, K, 1 if row_scale is None else M // row_scale.shape[0],
            ACTIVATION=activation, EXACT=dtype == torch.float32, PARTS=parts, BY_ROW=by_row,
            OWN_SCALE=own_scales, EVEN_K=K % config["BLOCK_K"] == 0,
            INT8=x.dtype == torch.int8, **config,
        )  # fmt: skip
    return made


@_fwd.register_fake
def _(x, xs, weight, ws, bias, residual, layer_scale, row_scale, out_scale, activation, dtype):
    return _alloc(x, weight, dtype, dtype.itemsize == 1 and out_scale is None)


@_fwd.register_flops
def _(x, x_scales, weight, *args, **kwargs):
    (M, K), N = x, weight[0]
    return 2 * M * N * K


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
    """`residual + row_scale * layer_scale * activation(x @ weight.T + bias)`, each part optional,
    of operands in eight bits, which `quantize` makes; or `activation(...)` in eight bits again.

    x (..., K), with scales for its rows, for parts of them (a multiple of 32 features) or, of fp8,
    one for all; weight (N, K), one scale a row; both "fp8" or both "int8". bias and layer_scale
    (N,), residual (..., N), row_scale (S,): fp32, fp16 or bf16. Returns (..., N) in `dtype`, or the
    dtype that it and the residual's are promoted to; with `format`, "fp8" | "int8", a Quantized
    with a scale for each 64 features of a row, or of fp8 with `out_scale` (1, 1) in fp32 that one
    for all. `activation`: "none" | "gelu". `implementation`: "auto" | "triton" | "torch". No
    gradient: backward raises. Raises ValueError for shapes, devices and names, TypeError for
    dtypes, RuntimeError where the chip does not multiply such numbers.
    """
    op = "quantized_linear"
    expect_quantized(op, "x", x)
    K = x.values.shape[-1]
    expect_quantized(op, "weight", weight, K)
    chosen = _policy.resolve(op, x.values, implementation, dtype=x.values.dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r}, expected one of {ACTIVATIONS}")
    if weight.values.dtype != x.values.dtype:
        raise TypeError(f"{op}: weight has {weight.values.dtype}, expected x's {x.values.dtype}")
    N = weight.values.shape[0]
    if weight.values.dim() != 2 or weight.scales.shape != (1, N):
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.values.shape)} and scales "
            f"{tuple(weight.scales.shape)}, expected (N, {K}) and (1, N)"
        )
    parts = x.scales.shape[0]
    if parts > 1 and K // parts % 32:
        raise ValueError(f"{op}: x has parts of {K // parts} features, expected a multiple of 32")
    if N * K >= 2**31:
        raise ValueError(f"{op}: weight is {N} x {K}, expected fewer than 2**31 elements")
    if K > MAX_K and x.values.dtype == torch.int8:
        raise ValueError(
            f"{op}: x has {K} features, expected {MAX_K} at most: int32 holds their sums"
        )
    lead = x.values.shape[:-1]
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
    if out is None and dtype not in _checks.DTYPES:
        raise TypeError(
            f"{op}: dtype {dtype}, expected float32, float16 or bfloat16 without a format"
        )
    if out is not None and (dtype is not None or any(t is not None for t in extras)):
        raise ValueError(
            f"{op}: format {format!r} with a dtype, residual, layer_scale or row_scale"
        )
    if out is not None and out_scale is None and N % PART:
        raise ValueError(f"{op}: {N} features in {format!r}, expected a multiple of {PART}")
    if chosen == "torch":
        return quantized_linear_reference(
            x, weight, bias, activation, *extras, dtype, format, out_scale
        )
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
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
