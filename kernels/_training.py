"""What the training nodes of layer_norm_attention and layer_norm_mlp share.

Each of them is one half of a transformer block: LayerNorm, a first linear layer, something between,
a second linear layer, and the epilogue with layer scale, drop path and the residual x.

Backward is one operator too. Its kernels leave partial sums of what is summed over rows, and one
launch of `column_sums` makes the gradients of biases, LayerNorm and LayerScale of them, each in its
parameter's dtype. Under autocast the operators take the weights as they are, cast both in one
launch, and keep the copies for backward.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, column_sums
from .layer_norm import run_backward as run_layer_norm_backward
from .linear.backward import run_backward


def wants_node(x: Tensor, tensors: Iterable[Tensor | None], residual: Tensor | None) -> bool:
    """Whether gradients are wanted, and the residual is x itself or none."""
    return _dispatch.wants_grad(x, *tensors) and (residual is None or residual is x)


def operands(
    op: str, names: Sequence[str], x: Tensor, tensors: Sequence[Any], inner: int, add: bool,
) -> tuple[list[Tensor | None], torch.dtype]:  # fmt: skip
    """The tensors after x as the training operator takes them: checked and contiguous.

    Args:
        op: Name of the operation, for errors.
        names: Of the six weights and biases, for errors.
        x: (..., D).
        tensors: norm_weight and norm_bias (D,); weight (rows, D) and bias (rows,) of the first
            linear layer; weight (D_out, inner) and bias (D_out,) of the second; layer_scale
            (D_out,); row_scale (S,) for S samples along x's first dimension.
        inner: Input features of the second linear layer.
        add: Whether x is the residual.

    Returns:
        The tensors, and the dtype of the GEMMs: autocast's, or x's.

    Raises:
        ValueError: For shapes and devices that do not fit.
        TypeError: For dtypes that do not fit.
    """
    *norm, w1, b1, w2, b2, layer_scale, row_scale = tensors
    dtype = _checks.autocast_dtype(x)
    weights = (*norm, w1, b1, w2, b2)
    D, rows, D_out = x.shape[-1], w1.shape[0], w2.shape[0]
    shapes = ((D,), (D,), (rows, D), (rows,), (D_out, inner), (D_out,))
    named = dict(zip(names, zip(weights, shapes, strict=True), strict=True))
    scales = {"layer_scale": (layer_scale, (D_out,)), "row_scale": (row_scale, x.shape[:1])}
    residual = (x if add else None, (*x.shape[:-1], D_out))
    _checks.expect(op, x, **named, **scales, residual=residual)
    if dtype is None:
        _checks.expect(op, x, x.dtype, **{k: named[k] for k in names[2:]})
    tensors = [t if t is None else t.contiguous() for t in (*weights, layer_scale, row_scale)]
    return tensors, dtype or x.dtype


def alloc_casts(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """For a copy of each weight in `dtype`; empty where the weight has it."""
    return [w.new_empty(0 if w.dtype == dtype else w.shape, dtype=dtype) for w in weights]


def cast_weights(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    """Fill the copies that `alloc_casts` made, in one launch; the weights as the GEMMs read them.

    Biases are no weights: they are added in fp32 as they are.
    """
    made = [(copy, w) for copy, w in zip(copies, weights, strict=True) if copy.numel()]
    if made:
        torch._foreach_copy_([copy for copy, _ in made], [w for _, w in made])
    return in_use(weights, copies)


def in_use(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    """Each weight's copy, or the weight itself where it has none."""
    return [copy if copy.numel() else w for copy, w in zip(copies, weights, strict=True)]


def save(ctx, tensors, output):
    """Save inputs for backward, and every output but the first, which has no gradient."""
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what is only saved


def alloc_gradients(
    x: Tensor, tensors: Sequence[Tensor | None], wants: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What an operator of backward returns; also its fake.

    Args:
        x: As forward had it.
        tensors: norm_weight and norm_bias; weight and bias of both linear layers; layer_scale.
        wants: Whether the gradients of the two weights are wanted.

    Returns:
        The gradients of x and of the tensors, each in its dtype; empty where there is no such
        tensor or its gradient is not wanted.
    """
    wanted = [t is not None for t in tensors]
    wanted[2], wanted[4] = wants
    grads = (
        x.new_empty(0) if t is None or not w else t.new_empty(t.shape)
        for t, w in zip(tensors, wanted, strict=True)
    )  # fmt: skip
    return x.new_empty(x.shape), *grads


def or_none(tensors: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, and None for the empty ones of an operator of backward."""
    pairs = zip(tensors, grads, strict=True)
    return [None if t is None or grad.shape != t.shape else grad for t, grad in pairs]


def through_scales(
    dy: Tensor, scaled: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None,
    dtype: torch.dtype, has_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Backward through layer scale and drop path of the second linear layer.

    Args:
        dy: (M, D_out), contiguous.
        scaled: What layer_scale scales, (M, D_out), or empty without one.
        layer_scale: (D_out,).
        row_scale: (S,).
        dtype: Of the GEMMs.
        has_bias: Whether to compute the gradient of the bias.

    Returns:
        The upstream gradient of the GEMM, (M, D_out) in `dtype`; partial sums of the gradients of
        the bias and of layer_scale, (P, D_out) in fp32, None where there is none.
    """
    changed = dy.dtype != dtype or layer_scale is not None or row_scale is not None
    if not changed and not has_bias:
        return dy, None, None
    dz = dy.new_empty(dy.shape, dtype=dtype) if changed else None
    saved = scaled if scaled.numel() else None
    sums = run_backward(dy, saved, layer_scale, row_scale, "none", dz, None, has_bias)
    return dy if dz is None else dz, *sums


def weight_gradient(dz: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dz^T @ x in `dtype`: of dz (M, N) and x (M, K), (N, K).

    fp32 gradients of a GEMM in half precision are its fp32 sums where PyTorch offers them.
    """
    if dtype == dz.dtype:
        return dz.t() @ x
    key = "CUDA" if dz.is_cuda else "CPU"
    if dtype == torch.float32 and torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::mm.dtype", key
    ):
        return torch.mm(dz.t(), x, out_dtype=dtype)
    return (dz.t() @ x).to(dtype)


def through_layer_norm(
    dnormed: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, normed: Tensor, eps: float,
    dresidual: Tensor | None, wants_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward through LayerNorm, which gives LN(x) once more. Operands are contiguous.

    Args:
        dnormed: (M, D), the gradient of LN(x).
        x: (M, D).
        norm_weight: (D,).
        norm_bias: (D,).
        normed: LN(x) in dnormed's dtype; empty to recompute it.
        eps: Added to the variance.
        dresidual: (M, D), a gradient that is added to dx.
        wants_normed: Whether LN(x) is read after this.

    Returns:
        dx (M, D) in x's dtype; LN(x), or `normed` where that is not wanted; partial sums of
        dnorm_weight and dnorm_bias, (P, 2, D) in fp32.
    """
    dx = x.new_empty(x.shape)
    recomputed = torch.empty_like(dnormed) if wants_normed and not normed.numel() else None
    sums = run_layer_norm_backward(
        dx, dnormed, dresidual, x, norm_weight, eps, norm_bias, recomputed
    )
    return dx, normed if recomputed is None else recomputed, sums


def finish(pairs: Iterable[tuple[Tensor | None, Tensor]]) -> None:
    """Sum partial sums over programs into gradients, all in one launch.

    Args:
        pairs: Partial sums (P, N) and the gradient (N,) that they make; None where there are none.
    """
    column_sums.run([(x, y) for x, y in pairs if x is not None])
