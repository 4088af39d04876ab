"""The operators of `layer_norm_mlp`, how they meet autograd, and the public function."""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _explain, _policy, _training
from ..layer_norm import layer_norm_reference
from ..layer_norm import run as normalise
from ..layer_norm_linear import layer_norm_linear
from ..linear import linear, linear_gelu_backward, linear_reference, worth_row_stats
from ..linear.configs import ROW_STATS_WIDTH
from ..linear.forward import run as run_linear
from .configs import FUSED_D, is_fused_by_table
from .forward import run

IMPLEMENTATIONS = ("auto", "fused", "triton", "cublas", "torch")
_OF_LINEAR = ("triton", "cublas", "torch")
_NAMES = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def _alloc(x, emit):
    """What forward returns. Also its fake, so the two cannot disagree."""
    M, D = x.shape
    row_stats = (D // ROW_STATS_WIDTH, 2, M) if emit else 0
    return x.new_empty(M, D), x.new_empty(row_stats, dtype=torch.float32)


@_dispatch.custom_op("deit_fast::layer_norm_mlp")
def _fwd(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None,
    fc2_weight: Tensor, fc2_bias: Tensor | None, residual: Tensor | None, eps: float, emit: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, row_stats = _alloc(x, emit)
    if y.numel():
        weights = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        run(y, row_stats if emit else None, x, *weights, residual, eps)
    return y, row_stats


@_fwd.register_fake
def _(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, eps, emit):
    return _alloc(x, emit)


def _alloc_training(x, fc1_weight, fc2_weight, layer_scale, recompute, dtype):
    """What forward returns in training; also its fake.

    y, and for backward z, LN(x), a, what layer_scale scales, and the weights in the GEMMs' dtype.
    They are empty where they are not saved.
    """
    (M, D), (D_out, hidden) = x.shape, fc2_weight.shape
    return (
        x.new_empty(M, D_out, dtype=torch.promote_types(x.dtype, dtype)),
        x.new_empty(M, hidden, dtype=dtype),
        x.new_empty(0 if recompute else (M, D), dtype=dtype),
        x.new_empty(0 if recompute else (M, hidden), dtype=dtype),
        x.new_empty(0 if layer_scale is None else (M, D_out), dtype=dtype),
        *_training.alloc_casts((fc1_weight, fc2_weight), dtype),
    )


@_dispatch.custom_op("deit_fast::layer_norm_mlp_training")
def _train(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None,
    fc2_weight: Tensor, fc2_bias: Tensor | None, layer_scale: Tensor | None,
    row_scale: Tensor | None, eps: float, add: bool, recompute: bool, dtype: torch.dtype,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = _alloc_training(x, fc1_weight, fc2_weight, layer_scale, recompute, dtype)
    y, z, normed, a, scaled, *copies = made
    fc1_weight, fc2_weight = _training.cast_weights((fc1_weight, fc2_weight), copies)
    if not y.numel():
        return made
    if recompute:  # what backward recomputes lives as long as it is read
        normed, a = z.new_empty(x.shape), torch.empty_like(z)
    normalise(normed, x, norm_weight, norm_bias, eps)
    run_linear(
        a, normed, fc1_weight, fc1_bias, z=z, activation="gelu", implementation=implementation
    )
    del normed
    run_linear(
        y, a, fc2_weight, fc2_bias, x if add else None, layer_scale, row_scale,
        z=None if layer_scale is None else scaled, implementation=implementation,
    )  # fmt: skip
    return made


@_train.register_fake
def _(x, g, h, fc1_weight, b1, fc2_weight, b2, layer_scale, rs, eps, add, recompute, dtype, impl):
    return _alloc_training(x, fc1_weight, fc2_weight, layer_scale, recompute, dtype)


@_fwd.register_flops
@_train.register_flops
def _(x, g, h, fc1_weight, b1, fc2_weight, *args, **kwargs):
    (M, D), (D_out, hidden) = x, fc2_weight
    return 2 * M * hidden * (D + D_out)


@_dispatch.custom_op("deit_fast::layer_norm_mlp_backward")
def _train_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor,
    fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
    layer_scale: Tensor | None, row_scale: Tensor | None, z: Tensor, normed: Tensor, a: Tensor,
    scaled: Tensor, fc1_copy: Tensor, fc2_copy: Tensor, eps: float, add: bool, wants_fc1: bool,
    wants_fc2: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    made = _training.alloc_gradients(x, tensors, (wants_fc1, wants_fc2))
    if not dy.numel():
        return tuple(t.zero_() for t in made)  # type: ignore[return-value]  # of eight
    _, dg, dh, dw1, db1, dw2, db2, dls = made
    w1, w2 = _training.in_use((fc1_weight, fc2_weight), (fc1_copy, fc2_copy))
    dz2, b2_sums, ls_sums = _training.through_scales(
        dy, scaled, layer_scale, row_scale, z.dtype, fc2_bias is not None
    )
    dz, recomputed, b1_sums = linear_gelu_backward(dz2, w2, z, implementation)
    if wants_fc2:
        dw2 = _training.weight_gradient(dz2, a if a.numel() else recomputed, fc2_weight.dtype)
    del dz2, recomputed
    dx, normed, norm_sums = _training.through_layer_norm(
        dz @ w1, x, norm_weight, norm_bias, normed, eps, dy if add else None, wants_fc1
    )
    if wants_fc1:
        dw1 = _training.weight_gradient(dz, normed, fc1_weight.dtype)
    _training.finish(
        (
            (norm_sums[:, 0], dg), (norm_sums[:, 1], dh), (b2_sums, db2),
            (None if fc1_bias is None else b1_sums, db1), (ls_sums, dls),
        )
    )  # fmt: skip
    return dx, dg, dh, dw1, db1, dw2, db2, dls


@_train_backward.register_fake
def _(dy, x, g, h, w1, b1, w2, b2, ls, rs, *rest):
    wants_fc1, wants_fc2, _ = rest[-3:]
    return _training.alloc_gradients(x, (g, h, w1, b1, w2, b2, ls), (wants_fc1, wants_fc2))


@_train_backward.register_flops
def _(dy, x, g, h, fc1_weight, b1, fc2_weight, *rest, **kwargs):
    (M, D), (D_out, hidden) = x, fc2_weight
    wants_fc1, wants_fc2, _ = rest[-3:]
    return 2 * M * hidden * (D * (1 + wants_fc1) + D_out * (1 + wants_fc2))


def _save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.add, _, _, ctx.implementation = inputs
    _training.save(ctx, tensors, output)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 14
    *tensors, z, normed, a, scaled, fc1_copy, fc2_copy = ctx.saved_tensors
    *inputs, rs = tensors
    nothing = (None,) * 6  # row_scale and what is no tensor
    if torch.is_grad_enabled():  # a second derivative is wanted
        return *_second_order(ctx, tensors, z.dtype, dy), *nothing
    wants = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    saved = (z, normed, a, scaled, fc1_copy, fc2_copy)
    grads = _train_backward(
        dy.contiguous(), *tensors, *saved, ctx.eps, ctx.add, *wants, ctx.implementation
    )
    return *_training.or_none(inputs, grads), *nothing


def _second_order(ctx, tensors, dtype, dy):
    """The gradients from PyTorch's operations, which can be differentiated again."""
    *inputs, rs = tensors
    samples = 1 if rs is None else rs.shape[0]

    def forward(x, *rest):
        x = x.unflatten(0, (samples, -1)) if x.shape[0] else x[None]
        residual = x if ctx.add else None
        g, h, *weights, layer_scale = rest
        y = layer_norm_reference(x.float(), g.float(), h.float(), ctx.eps)
        w1, b1, w2, b2 = _checks.cast(dtype, *weights)
        y = linear_reference(y.to(dtype), w1, b1, "gelu")
        return linear_reference(y, w2, b2, "none", residual, layer_scale, rs).flatten(0, 1)

    return _dispatch.differentiable(forward, inputs, dy)


_train.register_autograd(_backward, setup_context=_save)


def _why_not_fused(x, weights, residual, scaled, hidden, implementation):
    """Why one kernel can't or shouldn't do it all; None: it does."""
    if _dispatch.wants_grad(x, residual, *weights):
        return "gradients are wanted: it has none"
    half = x.dtype in (torch.float16, torch.bfloat16)
    if not half or _checks.autocast_dtype(x) not in (None, x.dtype):
        return f"x is {x.dtype}: it takes one half precision"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype} and x {x.dtype}: it takes one half precision"
    if x.shape[-1] not in FUSED_D or hidden % 32:
        return (
            f"D is {x.shape[-1]} and hidden {hidden}, expected D in {list(FUSED_D)}, "
            "hidden % 32 == 0"
        )
    if scaled:
        return "it has no LayerScale and no stochastic depth"
    if implementation == "fused":
        return None
    if _policy.resolve("linear", x, implementation, _OF_LINEAR, record=False) != "triton":
        return "Triton does not serve the matmuls"
    return None if is_fused_by_table(x, weights[4]) else "not measured faster"


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
    """LayerNorm -> fc1 -> GELU -> fc2 [-> layer scale, drop path, + residual].

    The weights are in x's dtype, under autocast in any.

    Args:
        x: (..., D).
        norm_weight: (D,), of LayerNorm.
        norm_bias: (D,).
        fc1_weight: (hidden, D).
        fc1_bias: (hidden,).
        fc2_weight: (D, hidden).
        fc2_bias: (D,).
        eps: Of LayerNorm.
        residual: (..., D); pass `x` itself for a pre-norm block.
        layer_scale: (D,).
        row_scale: (S,) drop-path mask of the S samples along x's first dimension.
        row_stats: Row statistics of x, as `layer_norm_linear` takes them.
        implementation: "auto", "triton", "cublas" or "torch": in parts unless a tuned table names
            the fused kernel. "fused" insists on it.
        return_row_stats: Return the row statistics of the result too, as `linear` does.
        recompute: Recompute LN(x) and GELU's result in backward instead of saving them.

    Returns:
        (..., D) in the promoted dtype of the GEMMs and the residual; with `return_row_stats` a
        tuple of that and the row statistics or None.

    Raises:
        ValueError: For shapes, devices and names that do not fit, and for "fused" where it can't
            serve.
        TypeError: For dtypes that do not fit.
        RuntimeError: For every choice but "auto" and "torch" where no kernel can run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"layer_norm_mlp: implementation {implementation!r}, expected one of {IMPLEMENTATIONS}"
        )
    weights = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    scaled = layer_scale is not None or row_scale is not None
    reason = _why_not_fused(x, weights, residual, scaled, fc1_weight.shape[0], implementation)
    if _explain.decisions is not None:
        served = "parts" if reason else "fused"
        _explain.record("layer_norm_mlp", served, reason or "one kernel")
    if reason is None:
        return _fused(x, weights, residual, eps, return_row_stats)
    if implementation == "fused":
        raise ValueError(f"layer_norm_mlp: implementation 'fused', but {reason}")
    if _is_one_node(x, (*weights, layer_scale), residual, implementation):
        if _explain.decisions is not None:
            _explain.record("layer_norm_mlp", "triton", "training: one autograd node")
            _policy.resolve("linear", x, implementation, _OF_LINEAR)
        tensors = (*weights, layer_scale, row_scale)
        y = _training_node(x, tensors, eps, residual is not None, recompute, implementation)
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
    weights = [*weights[:2], *_checks.cast(_checks.autocast_dtype(x), *weights[2:])]
    named = dict(zip(_NAMES, zip(weights, shapes, strict=True), strict=True))
    _checks.expect("layer_norm_mlp", x, **named, residual=(residual, x.shape))
    _checks.expect("layer_norm_mlp", x, x.dtype, **{k: named[k] for k in _NAMES[2:]})
    _policy.resolve("linear", x, "triton", record=False)
    x2 = x.reshape(-1, D).contiguous()
    residual = None if residual is None else residual.reshape(-1, D).contiguous()
    emit = return_row_stats and worth_row_stats(x2, D, (x, *weights, residual))
    weights = [t if t is None else t.contiguous() for t in weights]
    y, row_stats = _fwd(x2, *weights, residual, eps, emit)
    y = y.view(x.shape)
    return (y, row_stats if emit else None) if return_row_stats else y


def _is_one_node(x, tensors, residual, implementation):
    """Whether one node of the autograd graph serves; otherwise each part has its own."""
    if not _training.wants_node(x, tensors, residual):
        return False
    return _policy.resolve("linear", x, implementation, _OF_LINEAR, record=False) != "torch"


def _training_node(x, tensors, eps, add, recompute, implementation):
    hidden, D, D_out = tensors[2].shape[0], x.shape[-1], tensors[4].shape[0]
    rest, dtype = _training.operands("layer_norm_mlp", _NAMES, x, tensors, hidden, add)
    x2 = x.reshape(-1, D).contiguous()
    y = _train(x2, *rest, eps, add, recompute, dtype, implementation)[0]
    return y.view(*x.shape[:-1], D_out)
