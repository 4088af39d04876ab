"""What the training nodes of layer_norm_attention and layer_norm_mlp share.

Each of them is one half of a transformer block: LayerNorm, a first linear layer, something between,
a second linear layer, and the epilogue with layer scale, drop path and the residual x.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import _checks, _dispatch
from .linear import linear_backward


def wants_node(x: Tensor, tensors: Iterable[Tensor | None], residual: Tensor | None) -> bool:
    """Whether gradients are wanted, and the residual is x itself or none."""
    return _dispatch.wants_grad(x, *tensors) and (residual is None or residual is x)


def operands(
    op: str, names: Sequence[str], x: Tensor, tensors: Sequence[Tensor | None], inner: int,
    add: bool,
) -> list[Tensor | None]:  # fmt: skip
    """The tensors after x as the training operator takes them: checked, cast and contiguous.

    Args:
        op: Name of the operation, for errors.
        names: Of the six weights and biases, for errors.
        x: (..., D).
        tensors: norm_weight and norm_bias (D,); weight (rows, D) and bias (rows,) of the first
            linear layer; weight (D_out, inner) and bias (D_out,) of the second; layer_scale
            (D_out,); row_scale (S,) for S samples along x's first dimension.
        inner: Input features of the second linear layer.
        add: Whether x is the residual.

    Raises:
        ValueError: For shapes and devices that do not fit.
        TypeError: For dtypes that do not fit.
    """
    *norm, w1, b1, w2, b2, layer_scale, row_scale = tensors
    dtype = _checks.autocast_dtype(x)
    w1, w2 = _checks.cast(dtype, w1, w2)  # biases are added in fp32 as they are
    weights = (*norm, w1, b1, w2, b2)
    D, rows, D_out = x.shape[-1], w1.shape[0], w2.shape[0]
    shapes = ((D,), (D,), (rows, D), (rows,), (D_out, inner), (D_out,))
    named = dict(zip(names, zip(weights, shapes, strict=True), strict=True))
    scales = {"layer_scale": (layer_scale, (D_out,)), "row_scale": (row_scale, x.shape[:1])}
    residual = (x if add else None, (*x.shape[:-1], D_out))
    _checks.expect(op, x, **named, **scales, residual=residual)
    if dtype is None:
        _checks.expect(op, x, x.dtype, **{k: named[k] for k in names[2:]})
    return [t if t is None else t.contiguous() for t in (*weights, layer_scale, row_scale)]


def save(ctx, tensors, output):
    """Save inputs for backward, and every output but the first, which has no gradient."""
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what is only saved


def through_scales(
    dy: Tensor, scaled: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None,
    dtype: torch.dtype, has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward through layer scale and drop path of the second linear layer.

    Args:
        dy: (M, D_out), contiguous.
        scaled: What layer_scale scales, (M, D_out), or empty without one.
        layer_scale: (D_out,).
        row_scale: (S,).
        dtype: Of the GEMMs.
        has_bias: Whether to compute the gradient of the bias.

    Returns:
        The upstream gradient of the GEMM, (M, D_out) in `dtype`; the gradients of the bias and of
        layer_scale, (D_out,) in fp32, empty where there is none.
    """
    saved = scaled if scaled.numel() else None
    dz, dbias, dls = linear_backward(dy, saved, layer_scale, row_scale, "none", dtype, has_bias)
    return dz if dz.numel() else dy, dbias, dls


def in_dtypes_of(tensors: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, each in its tensor's dtype; None where there is no such tensor."""
    pairs = zip(tensors, grads, strict=True)
    return [None if t is None else grad.to(t.dtype) for t, grad in pairs]
