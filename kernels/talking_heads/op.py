"""The operators deit_fast::talking_heads*, their gradient, and the public function."""

import torch
from torch import Tensor

from .. import _checks, _chips, _dispatch, _policy
from .backward import run_backward
from .configs import why_not
from .forward import run
from .reference import talking_heads_attention_reference


def _alloc(qkv, keep):
    """What forward returns: o, and the LSE if `keep`. Also its fake."""
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H, d), qkv.new_empty((B, H, N) if keep else 0, dtype=torch.float32)


@_dispatch.custom_op("deit_fast::talking_heads")
def _fwd(
    qkv: Tensor, wl: Tensor, bl: Tensor | None, ww: Tensor, bw: Tensor | None, scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Forward; bl is an argument for the sake of its gradient.

    DistributedDataParallel waits for the gradient of every parameter, even one of zeros.
    """
    o, lse = _alloc(qkv, keep)
    if o.numel():
        run(o, lse if keep else None, qkv, wl, ww, bw, scale)
    return o, lse


@_fwd.register_fake
def _(qkv, wl, bl, ww, bw, scale, keep):
    return _alloc(qkv, keep)


@_fwd.register_flops
def _(qkv, *args, **kwargs):
    B, N, _, H, d = qkv
    return 4 * B * H * N * N * (d + H)  # of s and o; of t and a


def _alloc_backward(qkv):
    """What backward returns: dqkv, dWl, dbl, dWw, dbw. Also its fake."""
    H = qkv.shape[3]
    shapes = (H, H), (H,), (H, H), (H,)
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(s, dtype=torch.float32) for s in shapes)


@_dispatch.custom_op("deit_fast::talking_heads_backward")
def talking_heads_backward(
    do: Tensor, qkv: Tensor, wl: Tensor, ww: Tensor, bw: Tensor | None, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the kernels.

    Args:
        do: Gradient of o, (B, N, H, d), contiguous.
        qkv: (B, N, 3, H, d), contiguous.
        wl: Weight of the mixing before the softmax, (H, H).
        ww: Weight of the mixing after it, (H, H).
        bw: Bias of the mixing after it, (H,), or None.
        lse: (B, H, N) in fp32, units of log2.
        scale: Of the scores.

    Returns:
        The gradient of qkv, in its dtype, and in fp32 those of wl, bl (zeros), ww and bw.
    """
    dqkv, dwl, dbl, dww, dbw = _alloc_backward(qkv)
    if not qkv.numel():
        return dqkv, dwl.zero_(), dbl.zero_(), dww.zero_(), dbw.zero_()
    run_backward(dqkv, dwl, dww, do, qkv, wl, ww, bw, lse, scale)
    dbl.zero_()
    do_sum, v_sum = (t.sum(1, dtype=torch.float32) for t in (do, qkv[:, :, 2]))
    torch.sum(do_sum * v_sum, (0, 2), out=dbw)
    return dqkv, dwl, dbl, dww, dbw


@talking_heads_backward.register_fake
def _(do, qkv, wl, ww, bw, lse, scale):
    return _alloc_backward(qkv)


@talking_heads_backward.register_flops
def _(do, qkv, *args, **kwargs):
    B, N, _, H, d = qkv
    return 8 * B * H * N * N * (d + H)  # of dv, da, dq, dk; of dp, dWw, ds, dWl


def _save(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the LSE's gradient


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 7
    *tensors, lse = ctx.saved_tensors
    qkv, wl, bl, ww, bw = tensors
    if torch.is_grad_enabled():  # for a second derivative

        def forward(qkv, *weights):
            wl, bl, ww, bw = _checks.cast(qkv.dtype, *weights)
            return talking_heads_attention_reference(qkv, wl, bl, ww, bw, ctx.scale)

        return *_dispatch.differentiable(forward, tensors, do), None, None
    dqkv, *grads = talking_heads_backward(do.contiguous(), qkv, wl, ww, bw, lse, ctx.scale)
    weights = zip(grads, (wl, bl, ww, bw), strict=True)
    return dqkv, *(None if t is None else g.to(t.dtype) for g, t in weights), None, None


_fwd.register_autograd(_backward, setup_context=_save)


def talking_heads_attention(
    qkv: Tensor,
    proj_l_weight: Tensor,
    proj_l_bias: Tensor | None,
    proj_w_weight: Tensor,
    proj_w_bias: Tensor | None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attention whose heads are mixed before the softmax (proj_l) and after it (proj_w).

    The Triton kernels take up to 16 heads, in fp32 up to 8, of d = 32 or 48. Gradients of more than
    8 heads need 109 KB of shared memory per program; on chips without that "auto" is PyTorch.

    Args:
        qkv: (B, N, 3, H, d), the qkv GEMM's own layout, in fp32, fp16 or bf16; under autocast in
            any, cast to its dtype.
        proj_l_weight: (H, H), a row for each head of the result, in qkv's dtype; under autocast in
            any.
        proj_l_bias: (H,), or None.
        proj_w_weight: (H, H), like proj_l_weight.
        proj_w_bias: (H,), or None.
        scale: Of the scores q k^T; default 1 / sqrt(d).
        implementation: "auto" | "triton" | "torch".

    Returns:
        o (B, N, H, d) in qkv's dtype.

    Raises:
        ValueError: For shapes, devices, head counts and head dimensions that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" where no kernel can run.
    """
    chosen = _policy.resolve("talking_heads", qkv, implementation)
    dtype = _checks.autocast_dtype(qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"talking_heads_attention: qkv has shape {tuple(qkv.shape)}, expected (B, N, 3, H, d)"
        )
    N, _, H, d = qkv.shape[1:]
    _checks.expect(
        "talking_heads_attention", qkv, None if dtype else qkv.dtype,
        proj_l_weight=(proj_l_weight, (H, H)), proj_l_bias=(proj_l_bias, (H,)),
        proj_w_weight=(proj_w_weight, (H, H)), proj_w_bias=(proj_w_bias, (H,)),
    )  # fmt: skip
    weights = (proj_l_weight, proj_l_bias, proj_w_weight, proj_w_bias)
    scale = d**-0.5 if scale is None else float(scale)
    trains = _dispatch.wants_grad(qkv, *weights)
    small = chosen == "triton" and trains and H > 8 and _lacks_shared_memory(qkv.device)
    if chosen == "torch" or small and implementation == "auto":
        return talking_heads_attention_reference(qkv, *weights, scale)
    if small:
        raise ValueError(
            f"talking_heads_attention: gradients of {H} heads need 109 KB of shared memory, which "
            "this chip does not have; expected implementation 'auto' or 'torch'"
        )
    (qkv,) = _checks.cast(dtype, qkv)
    problem = why_not(H, d, qkv.dtype)
    if problem:
        raise ValueError(f"talking_heads_attention: {problem}")
    if N * 3 * H * d >= 2**31:
        raise ValueError(
            f"talking_heads_attention: one sample of qkv has 2**31 elements ({N} rows)"
        )
    wl, bl, ww, bw = (t if t is None else t.contiguous() for t in weights)
    return _fwd(qkv.contiguous(), wl, bl, ww, bw, scale, trains)[0]


def _lacks_shared_memory(device: torch.device) -> bool:
    """Whether a program may have 99 KB at most: consumer and inference chips."""
    capability = _chips.capability(device.type, device.index)
    return capability in ((8, 6), (8, 9)) or capability is not None and capability >= (12, 0)
