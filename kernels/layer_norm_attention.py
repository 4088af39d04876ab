"""The first half of a transformer block: x + proj(attention(qkv(layer_norm(x)))).

    q | k | v = LN(x) @ Wqkv^T + bqkv
    o         = softmax(scale * q k^T) v                      for each sample and head
    y         = residual + row_scale * layer_scale * (o @ Wproj^T + bproj)

It calls its parts: layer_norm_linear, attention, linear. Training, with residual = x (or none), is
one autograd node:

    dy'  = dy * layer_scale * row_scale      dbproj = sum_rows(dy')     dWproj = dy'^T @ o
    dqkv = dattention(dy' @ Wproj)           dbqkv = sum_rows(dqkv)     dWqkv = dqkv^T @ LN(x)
    dx   = dLN(dqkv @ Wqkv) + dy             both in the LayerNorm's backward kernel

dq, dk and dv are written in place in qkv's gradient, with the sums of their rows. Saved tensors: x,
qkv, o, the log-sum-exp of the softmax (B, H, N) in fp32, the weights; with a layer_scale its input.
LN(x) is recomputed, unless recompute=False asks to save it too.

B samples, N tokens, D features, H heads of d: x, residual (B, N, D), Wqkv (3 H d, D), Wproj (D_out,
H d), biases (3 H d,) and (D_out,), layer_scale (D_out,), row_scale (B,), the drop-path mask.
Precision is that of the parts: under autocast x stays fp32; LN(x), qkv and o have the GEMMs' dtype.
"""

import torch
from torch import Tensor

from . import _checks, _dispatch, _explain, _policy, _training
from .attention import TRAINED_HEAD_DIMS, attention, attention_reference
from .attention.forward import run as attend
from .attention.op import attention_backward_packed
from .layer_norm import layer_norm_reference
from .layer_norm import run as normalise
from .layer_norm_linear import layer_norm_linear, layer_norm_linear_backward
from .linear import linear, linear_reference
from .linear.forward import run


def layer_norm_attention_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    qkv_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, num_heads: int,
    eps: float = 1e-6, scale: float | None = None, residual: Tensor | None = None,
    layer_scale: Tensor | None = None, row_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`layer_norm_attention` in PyTorch's operations: the definition of right."""
    y = layer_norm_reference(x, norm_weight, norm_bias, eps)
    qkv = linear_reference(y, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    q, k, v = qkv.unbind(2)
    o = attention_reference(q, k, v, scale).flatten(2)
    return linear_reference(o, proj_weight, proj_bias, "none", residual, layer_scale, row_scale)


def _alloc(x, qkv_weight, proj_weight, layer_scale, num_heads, recompute):
    """What forward returns in training; also its fake.

    y, and the saved tensors: qkv, o, LSE, LN(x) and the input of layer_scale. The last two are
    empty where they are not saved.
    """
    (B, N, D), D_out, dtype = x.shape, proj_weight.shape[0], qkv_weight.dtype
    d = qkv_weight.shape[0] // (3 * num_heads)
    return (
        x.new_empty(B, N, D_out, dtype=torch.promote_types(x.dtype, dtype)),
        x.new_empty(B, N, 3, num_heads, d, dtype=dtype),
        x.new_empty(B, N, num_heads, d, dtype=dtype),
        x.new_empty(B, num_heads, N, dtype=torch.float32),
        x.new_empty(0 if recompute else (B * N, D), dtype=dtype),
        x.new_empty(0 if layer_scale is None else (B * N, D_out), dtype=dtype),
    )


@_dispatch.custom_op("deit_fast::layer_norm_attention_training")
def _train(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None,
    proj_weight: Tensor, proj_bias: Tensor | None, layer_scale: Tensor | None,
    row_scale: Tensor | None, num_heads: int, eps: float, scale: float, add: bool, recompute: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = _alloc(x, qkv_weight, proj_weight, layer_scale, num_heads, recompute)
    y, qkv, o, lse, normed, scaled = made
    if not y.numel():
        return made
    x = x.flatten(0, 1)
    if recompute:  # what backward recomputes is freed as soon as it was read
        normed = qkv.new_empty(x.shape)
    normalise(normed, x, norm_weight, norm_bias, eps)
    run(qkv.view(len(x), -1), normed, qkv_weight, qkv_bias, implementation=implementation)
    del normed
    q, k, v = qkv.unbind(2)
    attend(o, q, k, v, scale, lse=lse)
    run(
        y.flatten(0, 1), o.view(len(x), -1), proj_weight, proj_bias, x if add else None,
        layer_scale, row_scale, z=None if layer_scale is None else scaled,
        implementation=implementation,
    )  # fmt: skip
    return made


@_train.register_fake
def _(x, g, h, qkv_weight, b1, proj_weight, b2, layer_scale, rs, num_heads, e, s, a, recompute, i):
    return _alloc(x, qkv_weight, proj_weight, layer_scale, num_heads, recompute)


@_train.register_flops
def _(x, g, h, qkv_weight, b1, proj_weight, *args, **kwargs):
    (B, N, D), (D_out, width) = x, proj_weight  # width = H * d
    return 2 * B * N * width * (3 * D + 2 * N + D_out)


def _save(ctx, inputs, output):
    *tensors, ctx.num_heads, ctx.eps, ctx.scale, ctx.add, _, _ = inputs
    _training.save(ctx, tensors, output)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 15
    *tensors, qkv, o, lse, normed, scaled = ctx.saved_tensors
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, ls, rs = tensors
    nothing = (None,) * 7  # of row_scale and the arguments that are no tensors
    if torch.is_grad_enabled():  # a second derivative is wanted

        def forward(x, norm_weight, norm_bias, *rest):
            *weights, layer_scale = rest
            y = layer_norm_reference(x.float(), norm_weight.float(), norm_bias.float(), ctx.eps)
            w1, b1, w2, b2 = _checks.cast(qkv.dtype, *weights)
            split = linear_reference(y.to(qkv.dtype), w1, b1)
            q, k, v = split.unflatten(-1, (3, ctx.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
            # SDPA has no second derivative
            attended = (ctx.scale * q @ k.transpose(-2, -1)).softmax(-1) @ v
            attended = attended.transpose(1, 2).flatten(2)
            residual = x if ctx.add else None
            return linear_reference(attended, w2, b2, "none", residual, layer_scale, rs)

        return *_dispatch.differentiable(forward, tensors[:8], dy), *nothing
    dy = dy.contiguous().flatten(0, 1)
    dz, dbproj, dls = _training.through_scales(dy, scaled, ls, rs, o.dtype, proj_bias is not None)
    dproj = dz.t() @ o.flatten(2).flatten(0, 1) if ctx.needs_input_grad[5] else None
    do = (dz @ proj_weight).view(o.shape)
    dqkv, dbqkv = attention_backward_packed(do, qkv, o, lse, ctx.scale)
    del dz, do
    dx, dg, dh, dweight = layer_norm_linear_backward(
        dqkv.flatten(2).flatten(0, 1), x.flatten(0, 1), norm_weight, norm_bias, qkv_weight, normed,
        ctx.eps, dy if ctx.add else None, ctx.needs_input_grad[3],
    )  # fmt: skip
    vectors = (norm_weight, norm_bias, qkv_bias, proj_bias, ls)
    grads = (dg, dh, dbqkv.flatten(), dbproj, dls)
    g, h, b1, b2, layer_scale = _training.in_dtypes_of(vectors, grads)
    return dx.view(x.shape), g, h, dweight, b1, dproj, b2, layer_scale, *nothing


_train.register_autograd(_backward, setup_context=_save)


def layer_norm_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    scale: float | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_stats: Tensor | None = None,
    implementation: str = "auto",
    return_row_stats: bool = False,
    recompute: bool = True,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """LayerNorm -> qkv -> attention -> projection [-> layer scale, drop-path mask, + residual].

    Args:
        x: (B, N, D). Weights share its dtype; under autocast they may have any.
        norm_weight: (D,).
        norm_bias: (D,).
        qkv_weight: (3 num_heads d, D): the heads of q, then of k, then of v.
        qkv_bias: (3 num_heads d,).
        proj_weight: (D_out, num_heads d).
        proj_bias: (D_out,).
        num_heads: Heads of d features each.
        eps: Added to the variance.
        scale: Of q k^T; None: 1 / sqrt(d).
        residual: (B, N, D_out); x itself for a pre-norm block.
        layer_scale: (D_out,).
        row_scale: (B,), the drop-path mask: 0 or 1 / keep probability. It gets no gradient.
        row_stats: Row statistics of x, as for `layer_norm_linear`.
        implementation: "auto" | "triton" | "cublas" | "torch", of the GEMMs. Attention takes it
            too; "cublas" leaves it "auto".
        return_row_stats: Return the row statistics of the result too, as `linear` does.
        recompute: Whether backward recomputes LN(x); otherwise it is saved.

    Returns:
        (B, N, D_out) in the promoted dtype of the GEMM and the residual. With `return_row_stats`
        also the row statistics of its rows, or None.

    Raises:
        ValueError: For shapes and devices that do not fit. Errors name the part that raised them.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" or "cublas" where no kernel can run.
    """
    rows = qkv_weight.shape[0]
    if x.dim() != 3 or num_heads < 1 or rows % (3 * num_heads):
        raise ValueError(
            f"layer_norm_attention: x has shape {tuple(x.shape)} and qkv_weight "
            f"{tuple(qkv_weight.shape)}, expected (B, N, D) and (3 * {num_heads} * d, D)"
        )
    d = rows // (3 * num_heads)
    scale = d**-0.5 if scale is None else float(scale)
    attention_by = {"cublas": "auto"}.get(implementation, implementation)
    weights = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    one_node = scale > 0 and d in TRAINED_HEAD_DIMS
    if one_node and _trains(x, (*weights, layer_scale), residual, attention_by):
        if _explain.decisions is not None:
            _explain.record("layer_norm_attention", "triton", "training: one autograd node")
            _policy.resolve("linear", x, implementation, ("triton", "cublas", "torch"))
            _policy.resolve("attention", x, attention_by)
        y = _training_node(
            x, (*weights, layer_scale, row_scale), num_heads, eps, scale, residual is not None,
            recompute, implementation,
        )  # fmt: skip
        return (y, None) if return_row_stats else y
    qkv = layer_norm_linear(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, "none", row_stats, implementation
    )
    q, k, v = qkv.unflatten(2, (3, num_heads, d)).unbind(2)
    o = attention(q, k, v, scale, implementation=attention_by)
    return linear(
        o.flatten(2), proj_weight, proj_bias, "none", residual, layer_scale, row_scale,
        implementation, return_row_stats,
    )  # fmt: skip


def _trains(
    x: Tensor, tensors: tuple[Tensor | None, ...], residual: Tensor | None, implementation: str
) -> bool:
    """Whether one autograd node serves; otherwise the parts do, each with its own."""
    if not _training.wants_node(x, tensors, residual):
        return False
    return _policy.resolve("attention", x, implementation, record=False) != "torch"


def _training_node(x, tensors, num_heads, eps, scale, add, recompute, implementation):
    names = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    width = tensors[2].shape[0] // 3
    rest = _training.operands("layer_norm_attention", names, x, tensors, width, add)
    return _train(
        x.contiguous(), *rest, num_heads, eps, scale, add, recompute, implementation
    )[0]  # fmt: skip
