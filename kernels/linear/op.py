"""The operators of `linear`, how they meet autograd, and the public function."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks, _dispatch, _policy, column_sums
from . import cpu
from .backward import run_backward
from .configs import ROW_STATS_WIDTH
from .forward import run
from .reference import linear_reference

ACTIVATIONS = ("none", "gelu")


def _alloc(x, weight, residual, emit, keep):
    """What forward returns: y, row statistics, z. Also its fake, so the two cannot disagree."""
    (M, _), N = x.shape, weight.shape[0]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    row_stats = (N // ROW_STATS_WIDTH, 2, M) if emit else 0
    z = x.new_empty((M, N) if keep else 0)
    return x.new_empty(M, N, dtype=dtype), x.new_empty(row_stats, dtype=torch.float32), z


@_dispatch.custom_op("deit_fast::linear")
def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    activation: str,
    emit: bool,
    keep: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, row_stats, z = _alloc(x, weight, residual, emit, keep)
    if y.numel():
        extras = (bias, residual, layer_scale, row_scale)
        run(
            y, x, weight, *extras, row_stats_out=row_stats if emit else None,
            z=z if keep else None, activation=activation, implementation=implementation,
        )  # fmt: skip
    return y, row_stats, z


@_fwd.register_fake
def _(x, weight, bias, residual, layer_scale, row_scale, activation, emit, keep, implementation):
    return _alloc(x, weight, residual, emit, keep)


@_fwd.register_flops
def _(x, weight, *args, **kwargs):
    (M, K), N = x, weight[0]
    return 2 * M * N * K


def _alloc_backward(dy, z, bias, layer_scale, row_scale, activation, dtype):
    """What linear_backward returns; also its fake."""
    M, N = dy.shape
    changed = dy.dtype != dtype or activation != "none" or layer_scale is not None
    changed = changed or row_scale is not None
    return (
        dy.new_empty((M, N) if changed else 0, dtype=dtype),
        dy.new_empty(0) if bias is None else bias.new_empty(N),
        dy.new_empty(0) if layer_scale is None else layer_scale.new_empty(N),
    )


@_dispatch.custom_op("deit_fast::linear_backward")
def linear_backward(
    dy: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward from y to z of `linear`, with the sums over rows. Every operand is contiguous.

    Args:
        dy: (M, N).
        z: (M, N), x @ W^T + b; needed with GELU or a layer_scale.
        bias: (N,), for its dtype alone.
        layer_scale: (N,).
        row_scale: (S,).
        activation: "none" or "gelu".
        dtype: Of dz.

    Returns:
        dz (M, N), empty where it is dy itself; db (N,) in bias's dtype, empty without a bias;
        dlayer_scale (N,) in layer_scale's, empty without one.
    """
    made = _alloc_backward(dy, z, bias, layer_scale, row_scale, activation, dtype)
    dz, *vectors = made
    if not dy.numel():
        return dz, *(t.zero_() for t in vectors)
    if not any(t.numel() for t in made):
        return made
    dz_out = dz if dz.numel() else None
    has_bias = bias is not None
    sums = run_backward(dy, z, layer_scale, row_scale, activation, dz_out, None, has_bias)
    column_sums.run([(x, y) for x, y in zip(sums, vectors, strict=True) if x is not None])
    return made


@linear_backward.register_fake
def _(*args):
    return _alloc_backward(*args)


linear_backward.register_flops(_dispatch.no_flops)


def _save(ctx, inputs, output):
    x, weight, bias, residual, layer_scale, row_scale, ctx.activation, *_ = inputs
    z = output[2] if output[2].numel() else None
    ctx.save_for_backward(x, weight, bias, layer_scale, row_scale, z)
    ctx.res_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the row statistics and z


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    x, weight, bias, layer_scale, row_scale, z = ctx.saved_tensors
    dresidual = None if ctx.res_dtype is None else dy.to(ctx.res_dtype)
    if torch.is_grad_enabled():  # a second derivative is wanted
        samples = 1 if row_scale is None else row_scale.shape[0]

        def forward(x, weight, bias, layer_scale):
            bias = bias if bias is None else bias.to(x.dtype)
            x = x.unflatten(0, (samples, -1)) if x.shape[0] else x[None]
            operands = (x, weight, bias, ctx.activation, None, layer_scale, row_scale)
            return linear_reference(*operands).flatten(0, 1)

        tensors = (x, weight, bias, layer_scale)
        dx, dw, db, dls = _dispatch.differentiable(forward, tensors, dy.to(x.dtype))
        return dx, dw, db, dresidual, dls, *(None,) * 5
    dy = dy.contiguous()
    dz, db, dls = linear_backward(dy, z, bias, layer_scale, row_scale, ctx.activation, x.dtype)
    dz = dz if dz.numel() else dy
    dx, dw = None, None
    if ctx.needs_input_grad[0]:
        dx = dz @ weight
    if ctx.needs_input_grad[1]:
        dw = dz.t() @ x
    db = None if bias is None else db
    dls = None if layer_scale is None else dls
    return dx, dw, db, dresidual, dls, *(None,) * 5


_fwd.register_autograd(_backward, setup_context=_save)


def worth_row_stats(x: Tensor, N: int, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether row statistics of the result are likely to pay, without gradients.

    They pay where the next linear layer, three or four times as wide in a transformer, folds its
    LayerNorm: see `layer_norm_linear`.

    Args:
        x: (M, K).
        N: Features of the result.
        tensors: The other operands.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    half = half and all(t is None or t.dtype == x.dtype for t in tensors)
    return half and N % ROW_STATS_WIDTH == 0 and _dispatch.at_least(x.shape[0], 8 * N)


def _torch(x, weight, bias, activation, residual, layer_scale, row_scale):
    """The reference; in place after the matmul where no autograd or tracer records it.

    A new tensor for each step costs a CPU more than the arithmetic.
    """
    if row_scale is None and cpu.serves(x, weight, bias, residual, layer_scale):
        return cpu.run(x, weight, bias, activation, residual, layer_scale)
    tensors = [t for t in (x, weight, bias, residual, layer_scale) if t is not None]
    if row_scale is not None or _dispatch.needs_dispatcher(*tensors):
        return linear_reference(x, weight, bias, activation, residual, layer_scale, row_scale)
    y = F.linear(x, weight, bias)
    if activation == "gelu":
        y = torch.ops.aten.gelu_(y)
    if layer_scale is not None:
        y = y.mul_(layer_scale) if y.dtype == layer_scale.dtype else y * layer_scale
    if residual is None:
        return y
    return y.add_(residual) if y.dtype == residual.dtype else residual + y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    implementation: str = "auto",
    return_row_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """`residual + row_scale * layer_scale * activation(x @ weight.T + bias)`, each part optional.

    x, weight and bias share one of fp32, fp16 and bf16. Under autocast x and weight are cast to its
    dtype; the others stay as they are.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
        activation: "none", or "gelu": by erf, in half precision within 3e-5 of it.
        residual: (..., N).
        layer_scale: (N,).
        row_scale: (S,) drop-path mask of the S samples along x's first dimension. It gets no
            gradient.
        implementation: "auto", "triton", "cublas" or "torch".
        return_row_stats: Return the row statistics of the result too.

    Returns:
        (..., N) in the promoted dtype of x and residual. With `return_row_stats` a tuple of that
        and the row statistics for `layer_norm_linear`, (N / 64, 2, rows) in fp32: mean and sum of
        squared differences from it, of each 64 columns. They are None where `layer_norm_linear`
        would have no use for them, and with "torch".

    Raises:
        ValueError: For shapes, devices and names that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" or "cublas" where no kernel can run.
    """
    chosen = _policy.resolve("linear", x, implementation, ("triton", "cublas", "torch"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r}, expected one of {ACTIVATIONS}")
    if weight.dim() != 2 or x.dim() < 1:
        raise ValueError(
            f"linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (..., K) and (N, K)"
        )
    N, K = weight.shape
    lead = x.shape[:-1]
    _checks.expect(
        "linear", x, x=(x, (*lead, K)), bias=(bias, (N,)), residual=(residual, (*lead, N)),
        layer_scale=(layer_scale, (N,)), row_scale=(row_scale, lead[:1]),
    )  # fmt: skip
    dtype = _checks.autocast_dtype(x)
    if dtype is None:
        _checks.expect("linear", x, x.dtype, weight=(weight, (N, K)), bias=(bias, (N,)))
    if chosen == "torch":
        y = _torch(x, weight, bias, activation, residual, layer_scale, row_scale)
        return (y, None) if return_row_stats else y
    x, weight = _checks.cast(dtype, x, weight)  # the bias is added in fp32 as it is
    x2 = x.reshape(-1, K).contiguous()
    res2 = None if residual is None else residual.reshape(-1, N)
    rest = (weight, bias, res2, layer_scale, row_scale)
    trains = _dispatch.wants_grad(x2, *rest)
    emit = return_row_stats and not trains
    emit = emit and worth_row_stats(x2, N, (weight, res2, layer_scale, row_scale))
    # from z the gradients of GELU and layer_scale are computed
    keep = trains and (activation == "gelu" or layer_scale is not None)
    contiguous = (t if t is None else t.contiguous() for t in rest)
    y, row_stats, _ = _fwd(x2, *contiguous, activation, emit, keep, implementation)
    y = y.view(*lead, N)
    return (y, row_stats if emit else None) if return_row_stats else y
