"""Backward of the training node: the formulas of the package's docstring."""

import torch

from .. import _checks, _dispatch, _training
from ..layer_norm import layer_norm_reference
from ..layer_norm_linear import layer_norm_linear_backward
from ..linear import linear_gelu_backward, linear_reference


def save(ctx, inputs, output):
    """Save what backward needs, from the arguments and results of the training operator."""
    *tensors, ctx.eps, ctx.add, _, ctx.implementation = inputs
    _training.save(ctx, tensors, output)


def backward(ctx, dy, *_):
    """Gradients of the training operator's arguments."""
    if dy is None:
        return (None,) * 13
    *tensors, z, normed, a, scaled = ctx.saved_tensors
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, ls, rs = tensors
    nothing = (None,) * 5  # row_scale and what is no tensor
    if torch.is_grad_enabled():  # a second derivative is wanted
        return *_second_order(ctx, tensors, dy), *nothing
    dy = dy.contiguous()
    dz2, db2, dls = _training.through_scales(dy, scaled, ls, rs, z.dtype, fc2_bias is not None)
    dz, recomputed, db1 = linear_gelu_backward(dz2, fc2_weight, z, ctx.implementation)
    dw2 = dz2.t() @ (a if a.numel() else recomputed) if ctx.needs_input_grad[5] else None
    del dz2, recomputed
    dx, dg, dh, dw1 = layer_norm_linear_backward(
        dz, x, norm_weight, norm_bias, fc1_weight, normed, ctx.eps, dy if ctx.add else None,
        ctx.needs_input_grad[3],
    )  # fmt: skip
    vectors = (norm_weight, norm_bias, fc1_bias, fc2_bias, ls)
    g, h, b1, b2, scale = _training.in_dtypes_of(vectors, (dg, dh, db1, db2, dls))
    return dx, g, h, dw1, b1, dw2, b2, scale, *nothing


def _second_order(ctx, tensors, dy):
    """The gradients from PyTorch's operations, which can be differentiated again."""
    *inputs, rs = tensors
    dtype, samples = inputs[3].dtype, 1 if rs is None else rs.shape[0]

    def forward(x, *rest):
        x = x.unflatten(0, (samples, -1)) if x.shape[0] else x[None]
        residual = x if ctx.add else None
        g, h, *weights, layer_scale = rest
        y = layer_norm_reference(x.float(), g.float(), h.float(), ctx.eps)
        w1, b1, w2, b2 = _checks.cast(dtype, *weights)
        y = linear_reference(y.to(dtype), w1, b1, "gelu")
        return linear_reference(y, w2, b2, "none", residual, layer_scale, rs).flatten(0, 1)

    return _dispatch.differentiable(forward, inputs, dy)
