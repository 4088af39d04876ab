"""The second half of a transformer block: x + mlp(layer_norm(x)).

    y = residual + row_scale * layer_scale * (gelu(layer_norm(x) @ W1^T + b1) @ W2^T + b2)

Two ways. In parts: layer_norm_linear with GELU, then linear with the residual. Fused, for D = 192
in half precision and inference: one kernel in which the hidden layer never leaves the chip, 156 MB
less to move for DeiT-Ti at batch 256, at the price of products that wait for each other. By rule
the parts serve every shape; a tuned table may say otherwise, `implementation="fused"` insists.

x and residual (..., D), W1 (hidden, D), W2 (D, hidden), M rows. In the fused kernel the normalised
x and the hidden layer are rounded to x's dtype, sums are fp32.

Training, with z = LN(x) @ W1^T + b1, a = gelu(z) and residual = x (or none), is one node of the
graph:
    dy'  = dy * layer_scale * row_scale             db2 = sum_rows(dy')    dW2 = dy'^T @ a
    dz   = (dy' @ W2) * gelu'(z)                    db1 = sum_rows(dz)     dW1 = dz^T @ LN(x)
    dx   = dLN(dz @ W1) + dy                        both in the LayerNorm's backward pass
gelu' is behind the product, which makes a and the sums of dz's columns on the way. Saved for
backward: x, z, the weights; with a layer_scale what it scales. LN(x) and a are made again, unless
recompute=False asks to save them too, M (D + hidden) elements. z, a and LN(x) have the products'
dtype; under autocast x stays fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _chips, _dispatch, _policy, _tuned
from .layer_norm import layer_norm_reference
from .layer_norm import run as normalise
from .layer_norm_linear import layer_norm_linear, layer_norm_linear_backward
from .linear import (
    ROW_STATS_WIDTH,
    _epilogue,
    _gelu,
    linear,
    linear_backward,
    linear_gelu_backward,
    linear_reference,
    run,
    worth_row_stats,
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
    y_ptr, row_stats_out_ptr,  # out: (M, D) and (D / 64, 2, M) or None
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
        acc0, first_row, left, 0, vectors, res_ptr, y_ptr, row_stats_out_ptr, (None, None, None),
        M, D, 1, "none", False, BLOCK_M, D0,
    )  # fmt: skip
    _epilogue(
        acc1, first_row, left, D0, vectors, res_ptr, y_ptr, row_stats_out_ptr, (None, None, None),
        M, D, 1, "none", False, BLOCK_M, D1,
    )  # fmt: skip


def _config(m, h, warps, stages):
    return {"BLOCK_M": m, "BLOCK_H": h, "num_warps": warps, "num_stages": stages}


# D = 384 takes more than the registers of one CTA and reads its weights too often to gain.
FUSED_D = {192: (128, 64)}
HOPPER_CONFIGS = [_config(64, 32, 4, 3), _config(64, 32, 4, 2), _config(128, 32, 8, 2)]
AMPERE_CONFIGS = [_config(64, 32, 8, 2)]


def configs(capability: tuple[int, int]) -> list[dict]:
    """Every configuration of the fused kernel that a tuned table may name; the first by rule."""
    return HOPPER_CONFIGS if _chips.is_datacenter(capability) else AMPERE_CONFIGS


@_tuned.validates("layer_norm_mlp")
def _why_not(shape, choice, capability):
    if choice.get("implementation") == "fused":
        if shape.get("D") not in FUSED_D or shape.get("dtype") not in ("float16", "bfloat16"):
            return f"fused for {shape}, expected D in {list(FUSED_D)} and half precision"
        choice = choice | {"implementation": "triton"}
        return _tuned.check_choice(choice, ("triton",), configs(capability))
    return _tuned.check_choice(choice, ("parts",), ())


@_dispatch.custom_op("deit_fast::layer_norm_mlp")
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
    y, row_stats = _alloc(x, emit)
    if y.numel() == 0:
        return y, row_stats
    (M, D), hidden = x.shape, fc1_weight.shape[0]
    chip = _chips.chip(x.device)
    shape = {"M": M, "D": D, "hidden": hidden, "dtype": str(x.dtype)[6:]}
    found = _tuned.lookup("layer_norm_mlp", shape, chip) or {}
    config = {k: v for k, v in found.items() if k != "implementation"}
    config = config or configs(chip.capability)[0]
    with torch.cuda.device_of(x):
        _layer_norm_mlp_kernel[(_dispatch.cdiv(M, config["BLOCK_M"]),)](
            x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual,
            y, row_stats if emit else None, M, eps, HIDDEN=hidden,
            D0=FUSED_D[D][0], D1=FUSED_D[D][1], **config,
        )  # fmt: skip
    return y, row_stats


def _alloc(x, emit):
    """What forward returns. Also its fake, so the two cannot disagree."""
    M, D = x.shape
    row_stats = (D // ROW_STATS_WIDTH, 2, M) if emit else 0
    return x.new_empty(M, D), x.new_empty(row_stats, dtype=torch.float32)


@_fwd.register_fake
def _(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, eps, emit):
    return _alloc(x, emit)


def _alloc_training(x, fc1_weight, fc2_weight, layer_scale, recompute):
    """What forward returns in training: y, and for backward z, LN(x), a and what layer_scale
    scales, empty where they are not saved. Also its fake."""
    (M, D), (D_out, hidden), dtype = x.shape, fc2_weight.shape, fc1_weight.dtype
    return (
        x.new_empty(M, D_out, dtype=torch.promote_types(x.dtype, dtype)),
        x.new_empty(M, hidden, dtype=dtype),
        x.new_empty(0 if recompute else (M, D), dtype=dtype),
        x.new_empty(0 if recompute else (M, hidden), dtype=dtype),
        x.new_empty(0 if layer_scale is None else (M, D_out), dtype=dtype),
    )


@_dispatch.custom_op("deit_fast::layer_norm_mlp_training")
def _train(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    add: bool,
    recompute: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = _alloc_training(x, fc1_weight, fc2_weight, layer_scale, recompute)
    y, z, normed, a, scaled = made
    if not y.numel():
        return made
    if recompute:  # what backward makes again lives as long as it is read
        normed, a = z.new_empty(x.shape), torch.empty_like(z)
    normalise(normed, x, norm_weight, norm_bias, eps)
    run(a, normed, fc1_weight, fc1_bias, z=z, activation="gelu", implementation=implementation)
    del normed
    run(
        y, a, fc2_weight, fc2_bias, x if add else None, layer_scale, row_scale,
        z=None if layer_scale is None else scaled, implementation=implementation,
    )  # fmt: skip
    return made


@_train.register_fake
def _(x, g, h, fc1_weight, b1, fc2_weight, b2, layer_scale, row_scale, e, a, recompute, i):
    return _alloc_training(x, fc1_weight, fc2_weight, layer_scale, recompute)


@_fwd.register_flops
@_train.register_flops
def _(x, g, h, fc1_weight, b1, fc2_weight, *args, **kwargs):
    (M, D), (D_out, hidden) = x, fc2_weight
    return 2 * M * hidden * (D + D_out)


def _save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.add, _, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what is only saved


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 13
    *tensors, z, normed, a, scaled = ctx.saved_tensors
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, ls, rs = tensors
    nothing = (None,) * 5  # row_scale and what is no tensor
    if torch.is_grad_enabled():  # a second derivative is wanted
        samples = 1 if rs is None else rs.shape[0]

        def forward(x, *rest):
            x = x.unflatten(0, (samples, -1)) if x.shape[0] else x[None]
            residual = x if ctx.add else None
            *operands, layer_scale = rest
            y = layer_norm_reference(x.float(), *(t.float() for t in operands[:2]), ctx.eps)
            operands = _checks.cast(fc1_weight.dtype, *operands)
            y = linear_reference(y.to(fc1_weight.dtype), *operands[2:4], "gelu")
            y = linear_reference(y, *operands[4:], "none", residual, layer_scale, rs)
            return y.flatten(0, 1)

        return *_dispatch.differentiable(forward, tensors[:8], dy), *nothing
    dy = dy.contiguous()
    has_bias = fc2_bias is not None
    scaled = scaled if scaled.numel() else None
    dz2, db2, dls = linear_backward(dy, scaled, ls, rs, "none", z.dtype, has_bias)
    dz2 = dz2 if dz2.numel() else dy
    dz, made, db1 = linear_gelu_backward(dz2, fc2_weight, z, ctx.implementation)
    dw2 = dz2.t() @ (a if a.numel() else made) if ctx.needs_input_grad[5] else None
    del dz2, made
    dx, dg, dh, dw1 = layer_norm_linear_backward(
        dz, x, norm_weight, norm_bias, fc1_weight, normed, ctx.eps, dy if ctx.add else None,
        ctx.needs_input_grad[3],
    )  # fmt: skip
    sums = zip(
        (dg, dh, db1, db2, dls), (norm_weight, norm_bias, fc1_bias, fc2_bias, ls), strict=True
    )
    dg, dh, db1, db2, dls = (None if t is None else s.to(t.dtype) for s, t in sums)
    return dx, dg, dh, dw1, db1, dw2, db2, dls, *nothing


_train.register_autograd(_backward, setup_context=_save)


def _why_not_fused(x, weights, residual, scaled, hidden, implementation) -> str | None:
    """Why one kernel can't or shouldn't do it all; None: it does."""
    if _dispatch.wants_grad(x, residual, *weights):
        return "gradients are wanted: it has none"
    half = x.dtype in (torch.float16, torch.bfloat16)
    if not half or _checks.autocast_dtype(x) not in (None, x.dtype):
        return f"x is {x.dtype}: it takes one half precision"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype} and x {x.dtype}: it takes one half precision"
    if x.shape[-1] not in FUSED_D or hidden % 32:
        return f"D is {x.shape[-1]} and hidden {hidden}, expected D in {list(FUSED_D)}, hidden % 32 == 0"
    if scaled:
        return "it has no LayerScale and no stochastic depth"
    if implementation == "fused":
        return None
    if _policy.resolve("linear", x, implementation, ("triton", "cublas", "torch")) != "triton":
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
    row_stats: Tensor | None = None,
    implementation: str = "auto",
    return_row_stats: bool = False,
    recompute: bool = True,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """LayerNorm -> fc1 -> GELU -> fc2 [-> layer scale, row scale, + residual].

    x, residual (..., D); norm_weight, norm_bias, layer_scale, fc2_bias (D,); fc1_weight (hidden,
    D), fc1_bias (hidden,), fc2_weight (D, hidden); row_scale (S,) for S samples along x's first
    dimension. Weights in x's dtype (under autocast in any). Returns (..., D) in the promoted dtype
    of the product and the residual; pass `residual=x` for a pre-norm block. `row_stats` of x's rows
    and `return_row_stats` of the result's: as `layer_norm_linear` and `linear`. `implementation`:
    "auto" | "triton" | "cublas" | "torch", in parts unless a tuned table says fused; "fused"
    insists and raises ValueError where it can't be. `recompute` says whether backward makes LN(x)
    and GELU's result again or finds them saved. Other errors name the part that raised them.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"layer_norm_mlp: implementation {implementation!r}, expected one of {IMPLEMENTATIONS}"
        )
    weights = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    scaled = layer_scale is not None or row_scale is not None
    reason = _why_not_fused(x, weights, residual, scaled, fc1_weight.shape[0], implementation)
    if reason is None:
        return _fused(x, weights, residual, eps, return_row_stats)
    if implementation == "fused":
        raise ValueError(f"layer_norm_mlp: implementation 'fused', but {reason}")
    if _trains(x, (*weights, layer_scale), residual, implementation):
        operands = (*weights, layer_scale, row_scale)
        y = _training(x, operands, eps, residual is not None, recompute, implementation)
        return (y, None) if return_row_stats else y
    y = layer_norm_linear(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps, "gelu", row_stats, implementation
    )
    return linear(
        y, fc2_weight, fc2_bias, "none", residual, layer_scale, row_scale, implementation,
        return_row_stats,
    )  # fmt: skip


def _fused(x, weights, residual, eps, return_row_stats):
    D, hidden = x.shape[-1], weights[2].shape[0]
    shapes = ((D,), (D,), (hidden, D), (hidden,), (D, hidden), (D,))
    names = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    weights = [*weights[:2], *_checks.cast(_checks.autocast_dtype(x), *weights[2:])]
    named = dict(zip(names, zip(weights, shapes, strict=True), strict=True))
    _checks.expect("layer_norm_mlp", x, **named, residual=(residual, x.shape))
    _checks.expect("layer_norm_mlp", x, x.dtype, **{k: named[k] for k in names[2:]})
    _policy.resolve("linear", x, "triton")
    x2 = x.reshape(-1, D).contiguous()
    residual = None if residual is None else residual.reshape(-1, D).contiguous()
    emit = return_row_stats and worth_row_stats(x2, D, (x, *weights, residual))
    weights = [t if t is None else t.contiguous() for t in weights]
    y, row_stats = _fwd(x2, *weights, residual, eps, emit)
    y = y.view(x.shape)
    return (y, row_stats if emit else None) if return_row_stats else y


def _trains(x, tensors, residual, implementation) -> bool:
    """Whether one node of the graph serves; otherwise the parts, each with its own."""
    if not _dispatch.wants_grad(x, *tensors) or residual is not None and residual is not x:
        return False
    allowed = ("triton", "cublas", "torch")
    return _policy.resolve("linear", x, implementation, allowed) != "torch"


def _training(x, operands, eps, add, recompute, implementation):
    *norm, w1, b1, w2, b2, layer_scale, row_scale = operands
    dtype = _checks.autocast_dtype(x)
    w1, w2 = _checks.cast(dtype, w1, w2)  # biases are added in fp32 as they are
    weights = (*norm, w1, b1, w2, b2)
    names = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    D, hidden, D_out = x.shape[-1], weights[2].shape[0], weights[4].shape[0]
    shapes = ((D,), (D,), (hidden, D), (hidden,), (D_out, hidden), (D_out,))
    named = dict(zip(names, zip(weights, shapes, strict=True), strict=True))
    scales = {"layer_scale": (layer_scale, (D_out,)), "row_scale": (row_scale, x.shape[:1])}
    residual = (x if add else None, (*x.shape[:-1], D_out))
    _checks.expect("layer_norm_mlp", x, **named, **scales, residual=residual)
    if dtype is None:
        _checks.expect("layer_norm_mlp", x, x.dtype, **{k: named[k] for k in names[2:]})
    rest = [t if t is None else t.contiguous() for t in (*weights, layer_scale, row_scale)]
    y = _train(x.reshape(-1, D).contiguous(), *rest, eps, add, recompute, implementation)[0]
    return y.view(*x.shape[:-1], D_out)
