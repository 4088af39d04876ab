"""The operators deit_fast::attention*, their gradient, and the public function `attention`."""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _policy
from .backward import backward_torch, run_backward
from .configs import HEAD_DIMS, TRAINED_HEAD_DIMS, choose
from .forward import run
from .reference import attention_reference


def _alloc(q, keep):
    """What forward returns: o, and the LSE if `keep`. Also its fake."""
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, N) if keep else 0, dtype=torch.float32)


@_dispatch.custom_op("deit_fast::attention")
def _fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not keep and q.numel():  # the fused backward needs the LSE, which only the kernels write
        if choose(q, k.shape[1], bias is not None, implementation)[0] == "torch":
            o = attention_reference(q, k, v, scale, bias).contiguous()
            return o, q.new_empty(0, dtype=torch.float32)
    o, lse = _alloc(q, keep)
    if o.numel():
        run(o, q, k, v, scale, bias, lse if keep else None)
    return o, lse


@_fwd.register_fake
def _(q, k, v, bias, scale, keep, implementation):
    return _alloc(q, keep)


@_fwd.register_flops
def flops(q, k, *args, **kwargs):
    """Of the two matmuls of forward."""
    (B, N, H, d), L = q, k[1]
    return 4 * B * H * N * L * d


@_dispatch.custom_op("deit_fast::attention_backward")
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by the fused kernel.

    Arguments as those of `run_backward`.

    Returns:
        dq (B, N, H, d), dk and dv (B, L, H, d), contiguous.
    """
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    run_backward(dq, dk, dv, do, q, k, v, o, lse, scale)
    return dq, dk, dv


@attention_backward.register_fake
def _(do, q, k, v, o, lse, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


@attention_backward.register_flops
def _(do, q, k, *args, **kwargs):
    (B, N, H, d), L = q, k[1]
    return 8 * B * H * N * L * d  # dv, dp, dq, dk


def _save(ctx, inputs, output):
    q, k, v, bias, ctx.scale, keep, _ = inputs
    ctx.save_for_backward(q, k, v, bias, *(output if keep else ()))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the LSE's gradient


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 7
    q, k, v, bias, *rest = ctx.saved_tensors
    if rest and not torch.is_grad_enabled():
        return *attention_backward(do.contiguous(), q, k, v, *rest, ctx.scale), *(None,) * 4
    # with a bias, or for a second derivative
    return *backward_torch(do, q, k, v, bias, ctx.scale), *(None,) * 3


_fwd.register_autograd(_backward, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`softmax(scale * q k^T + bias) v` for every sample and head.

    Args:
        q: Queries (B, N, H, d) in fp32, fp16 or bf16; under autocast in any, cast to its dtype.
            Strided views are welcome. The Triton kernels take d = 32, 48, 64 and 80.
        k: Keys (B, L, H, d), L at least 1, in q's dtype.
        v: Values (B, L, H, d), in q's dtype.
        scale: Of the scores q k^T; default 1 / sqrt(d).
        bias: (H, N, L), in any float dtype: added to the scaled scores of every sample.
        implementation: "auto" | "triton" | "torch".

    Returns:
        o (B, N, H, d) in q's dtype, contiguous.

    Raises:
        ValueError: For shapes, devices and head dimensions that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" where no kernel can run.
    """
    chosen = _policy.resolve("attention", q, implementation)
    q, k, v, scale = checked(q, k, v, scale, bias)
    if chosen == "torch":
        return attention_reference(q, k, v, scale, bias)
    q, k, v, scale = kernel_operands(q, k, v, scale)
    bias = None if bias is None else bias.contiguous()
    keep = bias is None and q.shape[3] in TRAINED_HEAD_DIMS and _dispatch.wants_grad(q, k, v)
    return _fwd(q, k, v, bias, scale, keep, implementation)[0]


def checked(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Check the arguments of `attention`, and apply autocast and the default scale.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        scale: Of the scores, or None.
        bias: Of the scores, or None.

    Returns:
        q, k and v in autocast's dtype, and the scale.

    Raises:
        ValueError: For shapes and devices that do not fit.
        TypeError: For dtypes that do not fit.
    """
    if q.element_size() > 1:
        q, k, v = _checks.cast(_checks.autocast_dtype(q), q, k, v)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"attention: q has shape {tuple(q.shape)} and k {tuple(k.shape)}, "
            "expected (B, N, H, d) and (B, L, H, d)"
        )
    B, N, H, d = q.shape
    L = k.shape[1]
    _checks.expect("attention", q, q.dtype, k=(k, (B, L, H, d)), v=(v, (B, L, H, d)))
    _checks.expect("attention", q, bias=(bias, (H, N, L)))
    if L == 0:
        raise ValueError(f"attention: k has shape {tuple(k.shape)}, expected at least one key")
    return q, k, v, d**-0.5 if scale is None else float(scale)


def kernel_operands(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The operands as the kernels take them: d with stride 1, a positive scale.

    Args:
        q: Queries (B, N, H, d).
        k: Keys (B, L, H, d).
        v: Values (B, L, H, d).
        scale: Of the scores; 0 and less are moved into q.

    Returns:
        q, k, v and scale, of which softmax(scale * q k^T) v is the same.

    Raises:
        ValueError: For a head dimension that is not in `HEAD_DIMS`.
    """
    d = q.shape[3]
    if d not in HEAD_DIMS:
        raise ValueError(f"attention: head dimension {d}, the Triton kernel takes {HEAD_DIMS}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if scale <= 0:  # the kernels take the row maximum before they scale the scores
        q, scale = q * scale, 1.0
    return q, k, v, scale
