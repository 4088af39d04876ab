"""The second half of a transformer block: x + mlp(layer_norm(x)).

    y = residual + row_scale * layer_scale * (gelu(layer_norm(x) @ W1^T + b1) @ W2^T + b2)

Two ways. In parts: layer_norm_linear with GELU, then linear with the residual. Fused, for D = 192
in half precision and inference: one kernel in which the hidden layer never leaves the chip, 156 MB
less to move for DeiT-Ti at batch 256, at the price of products that wait for each other. By rule
the parts serve every shape; a tuned table may say otherwise, `implementation="fused"` insists.

x and residual (..., D), W1 (hidden, D), W2 (D, hidden), M rows. In the fused kernel the normalised
x and the hidden layer are rounded to x's dtype, sums are fp32. Backward: that of the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _runtime, _tuned
from .layer_norm import layer_norm_reference
from .layer_norm_linear import layer_norm_linear
from .linear import (
    MOMENTS_WIDTH,
    _epilogue,
    _gelu,
    linear,
    linear_reference,
    worth_moments,
)

IMPLEMENTATIONS = ("auto", "fused", "triton", "cublas", "torch")


def layer_norm_mlp_reference(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps=1e-6,
    residual=None, layer_scale=None, row_scale=None,
):  # fmt: skip
    y = layer_norm_reference(x, norm_weight, norm_bias, eps)
    hidden = linear_reference(y, fc1_weight, fc1_bias, "gelu")
    return linear_reference(hidden, fc2_weight, fc2_bias, "none", residual, layer_scale, row_scale)


@triton.jit
def _layer_norm_mlp_kernel(
    x_ptr, g_ptr, h_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, res_ptr,  # in; biases, res may be None
    y_ptr, moments_out_ptr,  # out: (M, D) and (D / 64, 2, M) or None
    M, eps, HIDDEN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """D = D0 + D1 columns in two powers of two; BLOCK_H features of the hidden layer at a time."""
    D: tl.constexpr = D0 + D1
    first_row = tl.program_id(0) * BLOCK_M
    rows, left = tl.arange(0, BLOCK_M), M - first_row
    in_rows = rows < left
    base = first_row.to(tl.int64) * D
    cols0, cols1, units = tl.arange(0, D0), D0 + tl.arange(0, D1), tl.arange(0, BLOCK_H)
    offs0, offs1 = rows[:, None] * D + cols0[None, :], rows[:, None] * D + cols1[None, :]
    mask = in_rows[:, None]

    x0 = tl.load(x_ptr + base + offs0, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr + base + offs1, mask=mask, other=0.0).to(tl.float32)
    mean = ((tl.sum(x0, axis=1) + tl.sum(x1, axis=1)) / D)[:, None]
    x0, x1 = x0 - mean, x1 - mean
    rstd = tl.rsqrt((tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1)) / D + eps)[:, None]
    x0 = x0 * rstd * tl.load(g_ptr + cols0).to(tl.float32)[None, :]
    x1 = x1 * rstd * tl.load(g_ptr + cols1).to(tl.float32)[None, :]
    x0 = (x0 + tl.load(h_ptr + cols0).to(tl.float32)[None, :]).to(x_ptr.dtype.element_ty)
    x1 = (x1 + tl.load(h_ptr + cols1).to(tl.float32)[None, :]).to(x_ptr.dtype.element_ty)

    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    for first in range(0, HIDDEN, BLOCK_H):
        w1_ptrs = w1_ptr + (first + units)[None, :] * D
        z = tl.dot(x0, tl.load(w1_ptrs + cols0[:, None]))
        z = tl.dot(x1, tl.load(w1_ptrs + cols1[:, None]), z)
        if b1_ptr is not None:
            z += tl.load(b1_ptr + first + units).to(tl.float32)[None, :]
        z = _gelu(z, False).to(x_ptr.dtype.element_ty)
        w2_ptrs = w2_ptr + (first + units)[:, None]
        acc0 = tl.dot(z, tl.load(w2_ptrs + cols0[None, :] * HIDDEN), acc0)
        acc1 = tl.dot(z, tl.load(w2_ptrs + cols1[None, :] * HIDDEN), acc1)
    vectors = (b2_ptr, None, None, None, None, None)
    _epilogue(
        acc0, first_row, left, 0, vectors, res_ptr, y_ptr, moments_out_ptr, M, D, 1,
        "none", False, BLOCK_M, D0,
    )  # fmt: skip
    _epilogue(
        acc1, first_row, left, D0, vectors, res_ptr, y_ptr, moments_out_ptr, M, D, 1,
        "none", False, BLOCK_M, D1,
    )  # fmt: skip


def _config(m, h, warps, stages):
    return {"BLOCK_M": m, "BLOCK_H": h, "num_warps": warps, "num_stages": stages}


# D = 384 takes more than the registers of one CTA and reads its weights too often to gain.
FUSED_D = {192: (128, 64)}
HOPPER_CONFIGS = [_config(64, 32, 4, 3), _config(64, 32, 4, 2), _config(128, 32, 8, 2)]
AMPERE_CONFIGS = [_config(64, 32, 8, 2)]


def configs(capability: tuple[int, int]) -> list[dict]:
    """Every configuration of the fused kernel that a tuned table may name; the first by rule."""
    return HOPPER_CONFIGS if capability >= (9, 0) else AMPERE_CONFIGS


@_tuned.validates("layer_norm_mlp")
def _why_not(shape, choice, capability):
    if choice.get("implementation") == "fused":
        if shape.get("D") not in FUSED_D or shape.get("dtype") not in ("float16", "bfloat16"):
            return f"fused for {shape}, want D in {list(FUSED_D)} and half precision"
        choice = choice | {"implementation": "triton"}
        return _tuned.check_choice(choice, ("triton",), configs(capability))
    return _tuned.check_choice(choice, ("parts",), ())


@_runtime.custom_op("deit_fast::layer_norm_mlp")
def _fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    emit: bool,
) -> tuple[Tensor, Tensor]:
    y, moments = _alloc(x, emit)
    if y.numel() == 0:
        return y, moments
    (M, D), hidden = x.shape, fc1_weight.shape[0]
    chip = _runtime.chip(x.device)
    shape = {"M": M, "D": D, "hidden": hidden, "dtype": str(x.dtype)[6:]}
    found = _tuned.lookup("layer_norm_mlp", shape, chip) or {}
    config = {k: v for k, v in found.items() if k != "implementation"}
    config = config or configs(chip.capability)[0]
    with torch.cuda.device_of(x):
        _layer_norm_mlp_kernel[(_runtime.cdiv(M, config["BLOCK_M"]),)](
            x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual,
            y, moments if emit else None, M, eps, HIDDEN=hidden,
            D0=FUSED_D[D][0], D1=FUSED_D[D][1], **config,
        )  # fmt: skip
    return y, moments


def _alloc(x, emit):
    """What forward returns. Also its fake, so the two cannot disagree."""
    M, D = x.shape
    moments = (D // MOMENTS_WIDTH, 2, M) if emit else 0
    return x.new_empty(M, D), x.new_empty(moments, dtype=torch.float32)


@_fwd.register_fake
def _(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, eps, emit):
    return _alloc(x, emit)


def _why_not_fused(x, weights, residual, scaled, hidden, implementation) -> str | None:
    """Why one kernel can't or shouldn't do it all; None: it does."""
    if _runtime.wants_grad(x, residual, *weights):
        return "gradients are wanted: it has none"
    if x.dtype not in (torch.float16, torch.bfloat16) or _runtime.autocast_dtype(x) not in (
        None, x.dtype,
    ):  # fmt: skip
        return f"x is {x.dtype}: it takes one half precision"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype} and x {x.dtype}: it takes one half precision"
    if x.shape[-1] not in FUSED_D or hidden % 32:
        return (
            f"D is {x.shape[-1]} and hidden {hidden}, want D in {list(FUSED_D)}, hidden % 32 == 0"
        )
    if scaled:
        return "it has no LayerScale and no stochastic depth"
    if implementation == "fused":
        return None
    if _runtime.resolve("linear", x, implementation, ("triton", "cublas", "torch")) != "triton":
        return "Triton does not serve the products"
    D, hidden = weights[4].shape
    found = _tuned.implementation("layer_norm_mlp", weights[4], x, x.dtype, D=D, hidden=hidden)
    return None if found == "fused" else "not measured faster"


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    moments: Tensor | None = None,
    implementation: str = "auto",
    return_moments: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """LayerNorm -> fc1 -> GELU -> fc2 [-> layer scale, row scale, + residual].

    x, residual (..., D); norm_weight, norm_bias, layer_scale, fc2_bias (D,); fc1_weight (hidden,
    D), fc1_bias (hidden,), fc2_weight (D, hidden); row_scale (S,) for S samples along x's first
    dimension. Weights in x's dtype (under autocast in any). Returns (..., D) in the promoted dtype
    of the product and the residual; pass `residual=x` for a pre-norm block. `moments` of x's rows
    and `return_moments` of the result's: as `layer_norm_linear` and `linear`. `implementation`:
    "auto" | "triton" | "cublas" | "torch", in parts unless a tuned table says fused; "fused"
    insists and raises ValueError where it can't be. Other errors name the part that raised them.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"layer_norm_mlp: implementation {implementation!r}, want one of {IMPLEMENTATIONS}"
        )
    hidden = fc1_weight.shape[0]
    weights = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    scaled = layer_scale is not None or row_scale is not None
    reason = _why_not_fused(x, weights, residual, scaled, hidden, implementation)
    if reason is None:
        return _fused(x, weights, residual, eps, return_moments)
    if implementation == "fused":
        raise ValueError(f"layer_norm_mlp: implementation 'fused', but {reason}")
    y = layer_norm_linear(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps, "gelu", moments, implementation
    )
    return linear(
        y, fc2_weight, fc2_bias, "none", residual, layer_scale, row_scale, implementation,
        return_moments,
    )  # fmt: skip


def _fused(x, weights, residual, eps, return_moments):
    D, hidden = x.shape[-1], weights[2].shape[0]
    shapes = ((D,), (D,), (hidden, D), (hidden,), (D, hidden), (D,))
    names = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    weights = [*weights[:2], *_runtime.cast(_runtime.autocast_dtype(x), *weights[2:])]
    named = dict(zip(names, zip(weights, shapes, strict=True), strict=True))
    _runtime.expect("layer_norm_mlp", x, **named, residual=(residual, x.shape))
    _runtime.expect("layer_norm_mlp", x, x.dtype, **{k: named[k] for k in names[2:]})
    _runtime.resolve("linear", x, "triton")
    x2 = x.reshape(-1, D).contiguous()
    residual = None if residual is None else residual.reshape(-1, D).contiguous()
    emit = return_moments and worth_moments(x2, D, (x, *weights, residual))
    weights = [t if t is None else t.contiguous() for t in weights]
    y, moments = _fwd(x2, *weights, residual, eps, emit)
    y = y.view(x.shape)
    return (y, moments if emit else None) if return_moments else y
