"""The operators deit_fast::window_attention*, their gradient, and the public function."""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _policy
from .backward import forward_twice_differentiable, run_backward
from .configs import HEAD_DIM
from .forward import run
from .reference import window_attention_reference


def _alloc(qkv, keep):
    """What forward returns: o, and the LSE if `keep`. Also its fake."""
    B, Y, X, H, _, d = qkv.shape
    lse = qkv.new_empty((B, Y, X, H) if keep else 0, dtype=torch.float32)
    return qkv.new_empty(B, Y, X, H, d), lse


@_dispatch.custom_op("deit_fast::window_attention")
def _fwd(
    qkv: Tensor, biases: Tensor, window: int, scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    o, lse = _alloc(qkv, keep)
    if o.numel():
        run(o, lse if keep else None, qkv, biases, window, scale)
    return o, lse


@_fwd.register_fake
def _(qkv, biases, window, scale, keep):
    return _alloc(qkv, keep)


@_fwd.register_flops
def _(qkv, biases, window, *args, **kwargs):
    B, Y, X, H, _, d = qkv
    return 4 * B * Y * X * H * window**2 * d


@_dispatch.custom_op("deit_fast::window_attention_backward")
def _bwd(
    do: Tensor, qkv: Tensor, biases: Tensor, o: Tensor, lse: Tensor, window: int, scale: float,
    learns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dqkv, and where the biases learn their gradient, (H, L) in fp32."""
    H, L = qkv.shape[3], window**2
    dqkv = torch.empty_like(qkv)
    dbiases = qkv.new_zeros((H, L) if learns else 0, dtype=torch.float32)
    if qkv.numel():
        run_backward(dqkv, dbiases if learns else None, do, qkv, biases, o, lse, window, scale)
    return dqkv, dbiases


@_bwd.register_fake
def _(do, qkv, biases, o, lse, window, scale, learns):
    shape = biases.shape if learns else 0
    return torch.empty_like(qkv), qkv.new_empty(shape, dtype=torch.float32)


@_bwd.register_flops
def _(do, qkv, biases, o, lse, window, *args, **kwargs):
    B, Y, X, H, _, d = qkv
    return 8 * B * Y * X * H * window**2 * d  # dv, dp, dq, dk


def _save(ctx, inputs, output):
    qkv, biases, ctx.window, ctx.scale, _ = inputs
    ctx.save_for_backward(qkv, biases, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the LSE's gradient


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 5
    qkv, biases, o, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # for a second derivative

        def forward(qkv, biases):
            return forward_twice_differentiable(qkv, biases, ctx.window, ctx.scale)

        return *_dispatch.differentiable(forward, (qkv, biases), do), None, None, None
    learns = ctx.needs_input_grad[1]
    dqkv, dbiases = _bwd(do.contiguous(), qkv, biases, o, lse, ctx.window, ctx.scale, learns)
    return dqkv, dbiases.to(biases.dtype) if learns else None, None, None, None


_fwd.register_autograd(_backward, setup_context=_save)


def window_attention(
    qkv: Tensor,
    biases: Tensor,
    window: int,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Softmax attention of every head inside every window of a feature map.

    Args:
        qkv: (B, Y, X, H, 3, 32) in fp32, fp16 or bf16; under autocast cast to its dtype.
        biases: (H, window^2) in any of these dtypes: at i * window + j the bias of two tokens that
            are i rows and j columns apart.
        window: Side of a window in tokens; Y and X are multiples of it.
        scale: Of the scores q k^T; default 1 / sqrt(32).
        implementation: "auto" | "triton" | "torch".

    Returns:
        o (B, Y, X, H, 32) in qkv's dtype, contiguous.

    Raises:
        ValueError: For shapes and devices that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" where no kernel can run.
    """
    chosen = _policy.resolve("window_attention", qkv, implementation)
    (qkv,) = _checks.cast(_checks.autocast_dtype(qkv), qkv)
    if qkv.dim() != 6 or qkv.shape[4:] != (3, HEAD_DIM):
        raise ValueError(
            f"window_attention: qkv has shape {tuple(qkv.shape)}, "
            f"expected (B, Y, X, H, 3, {HEAD_DIM})"
        )
    _, Y, X, H, _, d = qkv.shape
    if window < 1 or Y % window or X % window:
        raise ValueError(
            f"window_attention: window {window} on a map of {Y} x {X}, "
            "expected one that divides both"
        )
    _checks.expect("window_attention", qkv, biases=(biases, (H, window**2)))
    if biases.dtype not in _checks.DTYPES and chosen == "triton":
        raise TypeError(f"window_attention: biases have dtype {biases.dtype}, expected a float's")
    scale = d**-0.5 if scale is None else float(scale)
    if chosen == "torch":
        return window_attention_reference(qkv, biases, window, scale)
    if window * X * H * 3 * d >= 2**31:
        raise ValueError(f"window_attention: a window spans 2**31 elements of qkv ({X} x {H} wide)")
    keep = _dispatch.wants_grad(qkv, biases)
    return _fwd(qkv.contiguous(), biases.contiguous(), window, scale, keep)[0]
