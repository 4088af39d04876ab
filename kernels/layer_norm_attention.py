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
LN(x) is recomputed by the LayerNorm's backward kernel, unless recompute=False asks to save it too.

With `queries` = T only the first T tokens of a sample are queries: q, o, the residual and y have
those rows alone, k and v all of them. y is the first T tokens of what it is without.

B samples, N tokens, D features, H heads of d: x, residual (B, N, D), Wqkv (3 H d, D), Wproj (D_out,
H d), biases (3 H d,) and (D_out,), layer_scale (D_out,), row_scale (B,), the drop-path mask.
Precision is that of the parts: under autocast x stays fp32; LN(x), qkv and o have the GEMMs' dtype.
"""

from functools import partial

import torch
from torch import Tensor

from . import _checks, _dispatch, _explain, _policy, _training
from .attention import TRAINED_HEAD_DIMS, attention, attention_reference
from .attention.backward import run_backward as attend_backward
from .attention.forward import run as attend
from .layer_norm import layer_norm_reference
from .layer_norm import run as normalise
from .layer_norm_linear import layer_norm_linear
from .linear import linear, linear_reference
from .linear.forward import run


def layer_norm_attention_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    qkv_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, num_heads: int,
    eps: float = 1e-6, scale: float | None = None, residual: Tensor | None = None,
    layer_scale: Tensor | None = None, row_scale: Tensor | None = None, queries: int | None = None,
) -> Tensor:  # fmt: skip
    """`layer_norm_attention` in PyTorch's operations: the definition of right."""
    y = layer_norm_reference(x, norm_weight, norm_bias, eps)
    qkv = linear_reference(y, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    q, k, v = qkv.unbind(2)
    o = attention_reference(q[:, :queries], k, v, scale).flatten(2)
    residual = residual if residual is None else residual[:, :queries]
    return linear_reference(o, proj_weight, proj_bias, "none", residual, layer_scale, row_scale)


def _alloc(x, qkv_weight, proj_weight, layer_scale, num_heads, queries, recompute, dtype):
    """What forward returns in training; also its fake.

    y, and the saved tensors: qkv (or kv, and q), o, LSE, LN(x), the input of layer_scale, and the
    weights in the GEMMs' dtype. Each of q and the last four is empty where it is not saved.
    """
    (B, N, D), D_out = x.shape, proj_weight.shape[0]
    T, d = queries or N, qkv_weight.shape[0] // (3 * num_heads)
    return (
        x.new_empty(B, T, D_out, dtype=torch.promote_types(x.dtype, dtype)),
        x.new_empty(B, N, 2 if queries else 3, num_heads, d, dtype=dtype),
        x.new_empty((B, T, num_heads, d) if queries else 0, dtype=dtype),
        x.new_empty(B, T, num_heads, d, dtype=dtype),
        x.new_empty(B, num_heads, T, dtype=torch.float32),
        x.new_empty(0 if recompute else (B * N, D), dtype=dtype),
        x.new_empty(0 if layer_scale is None else (B * T, D_out), dtype=dtype),
        *_training.alloc_casts((qkv_weight, proj_weight), dtype),
    )


def _first(rows, tokens, queries):
    """The first tokens of each sample, as contiguous rows: (B N, D) -> (B T, D)."""
    return rows.view(-1, tokens, rows.shape[1])[:, :queries].contiguous().flatten(0, 1)


@_dispatch.custom_op("deit_fast::layer_norm_attention_training")
def _train(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None,
    proj_weight: Tensor, proj_bias: Tensor | None, layer_scale: Tensor | None,
    row_scale: Tensor | None, num_heads: int, queries: int, eps: float, scale: float, add: bool,
    recompute: bool, dtype: torch.dtype, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = _alloc(x, qkv_weight, proj_weight, layer_scale, num_heads, queries, recompute, dtype)
    y, qkv, q, o, lse, normed, scaled, *copies = made
    w1, w2 = _training.cast_weights((qkv_weight, proj_weight), copies)
    if not y.numel():
        return made
    N, x = x.shape[1], x.flatten(0, 1)
    if recompute:  # what backward recomputes is freed as soon as it was read
        normed = qkv.new_empty(x.shape)
    normalise(normed, x, norm_weight, norm_bias, eps)
    residual = x if add else None
    if queries:
        split = len(w1) // 3
        b, b_kv = (None, None) if qkv_bias is None else (qkv_bias[:split], qkv_bias[split:])
        first = _first(normed, N, queries)
        run(q.view(len(first), -1), first, w1[:split], b, implementation=implementation)
        run(qkv.view(len(x), -1), normed, w1[split:], b_kv, implementation=implementation)
        (k, v), residual = qkv.unbind(2), _first(x, N, queries) if add else None
    else:
        run(qkv.view(len(x), -1), normed, w1, qkv_bias, implementation=implementation)
        q, k, v = qkv.unbind(2)
    del normed
    attend(o, q, k, v, scale, lse=lse)
    run(
        y.flatten(0, 1), o.view(-1, w2.shape[1]), w2, proj_bias, residual, layer_scale, row_scale,
        z=None if layer_scale is None else scaled, implementation=implementation,
    )  # fmt: skip
    return made


@_train.register_fake
def _(x, g, h, w1, b1, w2, b2, ls, rs, num_heads, queries, e, s, a, recompute, dtype, i):
    return _alloc(x, w1, w2, ls, num_heads, queries, recompute, dtype)


@_train.register_flops
def _(x, g, h, w1, b1, w2, b2, ls, rs, num_heads, queries, *args, **kwargs):
    (B, N, D), (D_out, width) = x, w2  # width = H * d
    T = queries or N
    return 2 * B * width * (T * D + 2 * N * D + 2 * T * N + T * D_out)


@_dispatch.custom_op("deit_fast::layer_norm_attention_backward")
def _train_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    qkv_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
    layer_scale: Tensor | None, row_scale: Tensor | None, qkv: Tensor, q: Tensor, o: Tensor,
    lse: Tensor, normed: Tensor, scaled: Tensor, qkv_copy: Tensor, proj_copy: Tensor, eps: float,
    scale: float, add: bool, wants_qkv: bool, wants_proj: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale)
    made = _training.alloc_gradients(x, tensors, (wants_qkv, wants_proj))
    if not dy.numel():
        return tuple(t.zero_() for t in made)  # type: ignore[return-value]  # of eight
    _, dg, dh, dw1, db1, dw2, db2, dls = made
    w1, w2 = _training.in_use((qkv_weight, proj_weight), (qkv_copy, proj_copy))
    shape, N, T, split = x.shape, x.shape[1], dy.shape[1], len(w1) // 3
    x, dy, wgrad = x.flatten(0, 1), dy.flatten(0, 1), _training.weight_gradient
    dz, b2_sums, ls_sums = _training.through_scales(
        dy, scaled, layer_scale, row_scale, o.dtype, proj_bias is not None
    )
    if wants_proj:
        dw2 = wgrad(dz, o.view(len(dz), -1), proj_weight.dtype)
    do, dqkv = (dz @ w2).view(o.shape), qkv.new_empty(qkv.shape)
    del dz
    whole = not q.numel()
    dq, q = (dqkv[:, :, 0], qkv[:, :, 0]) if whole else (q.new_empty(q.shape), q)
    (dk, dv), (k, v) = dqkv[:, :, -2:].unbind(2), qkv[:, :, -2:].unbind(2)
    has_bias = qkv_bias is not None
    q_sums, kv_sums = attend_backward(dq, dk, dv, do, q, k, v, o, lse, scale, sums=has_bias)
    del do
    dqkv = dqkv.view(len(x), -1)
    if whole:
        dnormed, dresidual = dqkv @ w1, dy if add else None
    else:
        dnormed, dq, dresidual = dqkv @ w1[split:], dq.view(len(dy), -1), None
        dnormed.view(shape)[:, :T].add_((dq @ w1[:split]).view(-1, T, shape[2]))
    dx, normed, norm_sums = _training.through_layer_norm(
        dnormed, x, norm_weight, norm_bias, normed, eps, dresidual, wants_qkv
    )
    if add and not whole:
        dx.view(shape)[:, :T].add_(dy.view(-1, T, shape[2]))
    if wants_qkv and whole:
        dw1 = wgrad(dqkv, normed, qkv_weight.dtype)
    elif wants_qkv:
        parts = ((dq, _first(normed, N, T)), (dqkv, normed))
        dw1 = torch.cat([wgrad(dz, y, qkv_weight.dtype) for dz, y in parts])
    _training.finish(
        (
            (norm_sums[:, 0], dg), (norm_sums[:, 1], dh), (b2_sums, db2),
            (q_sums, db1[:split]), (kv_sums, db1[split:]), (ls_sums, dls),
        )
    )  # fmt: skip
    return dx.view(shape), dg, dh, dw1, db1, dw2, db2, dls


@_train_backward.register_fake
def _(dy, x, g, h, w1, b1, w2, b2, ls, *rest):
    return _training.alloc_gradients(x, (g, h, w1, b1, w2, b2, ls), rest[-2:])


@_train_backward.register_flops
def _(dy, x, g, h, w1, b1, w2, *rest, **kwargs):
    (B, T, D_out), (_, N, D), width = dy, x, w2[1]
    wants_qkv, wants_proj = rest[-2:]
    gemms = (T + 2 * N) * D * (1 + wants_qkv) + T * D_out * (1 + wants_proj)
    return 2 * B * width * (gemms + 4 * T * N)


def _save(ctx, inputs, output):
    *tensors, ctx.num_heads, ctx.queries, ctx.eps, ctx.scale, ctx.add, _, ctx.dtype, _ = inputs
    _training.save(ctx, tensors, output)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 17
    every = ctx.saved_tensors  # once: checkpoints ask for it
    tensors, saved = every[:9], every[9:]
    nothing = (None,) * 9  # of row_scale and the arguments that are no tensors
    if torch.is_grad_enabled():  # a second derivative is wanted

        def forward(x, norm_weight, norm_bias, *rest):
            *weights, layer_scale = rest
            y = layer_norm_reference(x.float(), norm_weight.float(), norm_bias.float(), ctx.eps)
            w1, b1, w2, b2 = _checks.cast(ctx.dtype, *weights)
            split = linear_reference(y.to(ctx.dtype), w1, b1)
            q, k, v = split.unflatten(-1, (3, ctx.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
            # SDPA has no second derivative
            T = ctx.queries or x.shape[1]
            attended = (ctx.scale * q[:, :, :T] @ k.transpose(-2, -1)).softmax(-1) @ v
            attended = attended.transpose(1, 2).flatten(2)
            residual = x[:, :T] if ctx.add else None
            return linear_reference(attended, w2, b2, "none", residual, layer_scale, tensors[8])

        return *_dispatch.differentiable(forward, tensors[:8], dy), *nothing
    wants = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    grads = _train_backward(dy.contiguous(), *tensors, *saved, ctx.eps, ctx.scale, ctx.add, *wants)
    return *_training.or_none(tensors[:8], grads), *nothing


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
    queries: int | None = None,
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
        queries: T, the number of tokens at the beginning of each sample that are queries; None: N.

    Returns:
        (B, N, D_out), with `queries` (B, T, D_out), in the promoted dtype of the GEMM and the
        residual. With `return_row_stats` also the row statistics of its rows, or None.

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
    if queries is not None and not 1 <= queries <= x.shape[1]:
        raise ValueError(
            f"layer_norm_attention: queries is {queries}, expected 1 to {x.shape[1]}, x's tokens"
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
            x, (*weights, layer_scale, row_scale), num_heads, queries or 0, eps, scale,
            residual is not None, recompute, implementation,
        )  # fmt: skip
        return (y, None) if return_row_stats else y
    project = partial(
        layer_norm_linear, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
        implementation=implementation,
    )  # fmt: skip
    if queries is None:
        qkv = project(x, weight=qkv_weight, bias=qkv_bias, row_stats=row_stats)
        q, k, v = qkv.unflatten(2, (3, num_heads, d)).unbind(2)
    else:
        first, split = x[:, :queries].contiguous(), rows // 3
        if residual is not None:
            residual = first if residual is x else residual[:, :queries].contiguous()
        b, b_kv = (None, None) if qkv_bias is None else (qkv_bias[:split], qkv_bias[split:])
        q = project(first, weight=qkv_weight[:split], bias=b).unflatten(2, (num_heads, d))
        kv = project(x, weight=qkv_weight[split:], bias=b_kv, row_stats=row_stats)
        k, v = kv.unflatten(2, (2, num_heads, d)).unbind(2)
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


def _training_node(x, tensors, num_heads, queries, eps, scale, add, recompute, implementation):
    names = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    width = tensors[2].shape[0] // 3
    rest, dtype = _training.operands("layer_norm_attention", names, x, tensors, width, add)
    sizes = (num_heads, queries, eps, scale)
    return _train(x.contiguous(), *rest, *sizes, add, recompute, dtype, implementation)[0]
