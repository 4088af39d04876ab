"""LayerNorm, alone or fused with the residual add that precedes it.

    h = x [+ residual]                            stored with a residual: the next residual stream
    y = xhat * w + b,   xhat = (h - mean) * rstd,   rstd = 1 / sqrt(var + eps)

Backward, per row, with g = dy * w and dh the gradient arriving at h:
    dx = dresidual = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh
    dw = sum_rows(dy * xhat)        db = sum_rows(dy)

M rows, N features. Arithmetic, mean and rstd are fp32 whatever the dtypes. x, residual, weight and
output may differ in dtype (autocast: fp32 residual stream in, bf16 out). Saved tensors: h (x where
there is no residual), weight and bias. Backward reads the row anyway, so it recomputes mean and
rstd. dw and db are summed over the rows of a program in fp32, then over the programs and rounded
once, by `column_sums`. Where a linear layer follows, the kernel can write y again on the way, which
that layer's weight gradient reads.

In inference the same kernel may quantize y, with per-row scales: layer_norm_quantized.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _chips, _dispatch, _plans, _policy, column_sums
from .quantize import _round, _scales, meta

MAX_N = 8192  # one row is held in registers


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """`layer_norm` in PyTorch's operations: the definition of right."""
    dtype = x.dtype
    if weight.dtype != dtype and _checks.autocast_dtype(x) is None:  # torch wants one dtype
        wide = torch.promote_types(dtype, weight.dtype)
        x, weight, bias = _checks.cast(wide, x, weight, bias)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in PyTorch's operations: the definition of right."""
    h = x + residual
    return layer_norm_reference(h, weight, bias, eps), h


@triton.jit
def _layer_norm_kernel(
    x_ptr, res_ptr, w_ptr, b_ptr,  # in:  (M, N) (M, N) or None (N,) (N,)
    y_ptr, h_ptr,  # out: (M, N) (M, N) or None
    scales_ptr,  # out: (M,) where y is quantized, else None
    M, N, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # int64: M * N may exceed 2**31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offs = rows[:, None] * N + cols[None, :]

    h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if res_ptr is not None:
        h += tl.load(res_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        # normalise the rounded h, the one that backward reads
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
        tl.store(h_ptr + offs, h, mask=mask)
    mean = tl.sum(h, axis=1) / N
    diff = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(diff * diff, axis=1) / N + eps)
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)

    y = diff * rstd[:, None] * w[None, :] + b[None, :]
    if scales_ptr is not None:
        INT8: tl.constexpr = y_ptr.dtype.element_ty == tl.int8
        scales, inverse = _scales(y, INT8)
        tl.store(scales_ptr + rows, scales, mask=rows < M)
        y = _round(y, inverse[:, None], INT8)
    tl.store(y_ptr + offs, y, mask=mask)


@triton.jit
def _layer_norm_backward_kernel(
    h_ptr, w_ptr, dy_ptr, dh_ptr, b_ptr,  # in: (M, N) (N,) (M, N); (M, N) or None; (N,) or None
    dx_ptr, sums_ptr, y_ptr,  # out: (M, N) (programs, 2, N); (M, N) or None
    M, N, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    in_cols = cols < N
    w = tl.load(w_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        # int64: M * N may exceed 2**31
        rows = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & in_cols[None, :]
        offs = rows[:, None] * N + cols[None, :]
        h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(h, axis=1) / N
        diff = tl.where(mask, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(diff * diff, axis=1) / N + eps)[:, None]
        xhat = diff * rstd
        g = dy * w
        mean_g, mean_gx = tl.sum(g, axis=1) / N, tl.sum(g * xhat, axis=1) / N
        dx = rstd * (g - mean_g[:, None] - xhat * mean_gx[:, None])
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx, mask=mask)
        dw += dy * xhat
        db += dy
        if y_ptr is not None:  # as forward computed it; last, when few other numbers are alive
            b = tl.load(b_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
            tl.store(y_ptr + offs, xhat * w + b, mask=mask)
    sums_ptr += tl.program_id(0).to(tl.int64) * 2 * N
    tl.store(sums_ptr + cols, tl.sum(dw, axis=0), mask=in_cols)
    tl.store(sums_ptr + N + cols, tl.sum(db, axis=0), mask=in_cols)


# Of backward, per SM: what is resident at once, such as 6 programs of 4 warps. Each program writes
# one partial sum.
BACKWARD_WARPS = 24


def meta_backward(N: int) -> dict:
    """Tile and warps of backward, which are forward's.

    4 warps get at most 80 registers a thread: with more only 5 programs would be resident.
    """
    config = meta(N)
    return config | {"maxnreg": 80} if config["num_warps"] == 4 else config


def run(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None,
    h: Tensor | None = None, scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the kernel on contiguous operands.

    Args:
        y: Output (M, N).
        x: (M, N).
        weight: (N,).
        bias: (N,).
        eps: Added to the variance.
        residual: (M, N).
        h: Output (M, N), with a residual only.
        scales: Output (1, M), with a quantized y only.
    """
    M, N = x.shape
    config = meta(N)
    if M > 0:
        grid = (_dispatch.cdiv(M, config["BLOCK_M"]),)
        with torch.cuda.device_of(x):  # Triton launches on the current device; a no-op on CPU
            _plans.launch(
                _layer_norm_kernel, grid,
                x, residual, weight, bias, y, h, scales, M, N, eps, **config,
            )  # fmt: skip


def _alloc(x, residual, out_dtype):
    """What forward returns; also its fake, so the two cannot differ."""
    h_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    h = x.new_empty(0 if residual is None else x.shape, dtype=h_dtype)
    return x.new_empty(x.shape, dtype=out_dtype), h


@_dispatch.custom_op("deit_fast::layer_norm")
def _fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y, h = _alloc(x, residual, out_dtype)
    run(y, x, weight, bias, eps, residual, None if residual is None else h)
    return y, h


@_fwd.register_fake
def _(x, residual, weight, bias, eps, out_dtype):
    return _alloc(x, residual, out_dtype)


_fwd.register_flops(_dispatch.no_flops)


def run_backward(
    dx: Tensor, dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, eps: float,
    bias: Tensor | None = None, y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch the backward kernel on contiguous operands of one row or more.

    Args:
        dx: Output (M, N).
        dy: (M, N), the gradient of the normalised rows.
        dh: (M, N), the gradient that reaches h otherwise, which is added to dx; None: none.
        h: (M, N), the rows that were normalised.
        weight: (N,).
        eps: Added to the variance.
        bias: (N,), with y only.
        y: Output (M, N), the normalised rows once more; None: not wanted.

    Returns:
        Partial sums of dweight and dbias, (programs, 2, N) in fp32, for `column_sums`.
    """
    M, N = h.shape
    config = meta_backward(N)
    resident = max(1, BACKWARD_WARPS // config["num_warps"])
    programs = resident * _chips.chip(h.device).num_sms
    programs = min(programs, _dispatch.cdiv(M, config["BLOCK_M"]))
    sums = h.new_empty(programs, 2, N, dtype=torch.float32)
    bias = bias if y is not None else None
    with torch.cuda.device_of(h):
        _plans.launch(
            _layer_norm_backward_kernel, (programs,),
            h, weight, dy, dh, bias, dx, sums, y, M, N, eps, **config,
        )  # fmt: skip
    return sums


def _alloc_backward(h, weight, bias, dtype):
    """What layer_norm_backward returns; also its fake."""
    return (
        h.new_empty(h.shape, dtype=dtype),
        weight.new_empty(h.shape[1]),
        bias.new_empty(h.shape[1]),
    )


@_dispatch.custom_op("deit_fast::layer_norm_backward")
def layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward of LayerNorm, on contiguous operands.

    Args:
        dy: (M, N), the gradient of the normalised rows.
        dh: (M, N), the gradient that reaches h otherwise; None: none.
        h: (M, N), the rows that were normalised.
        weight: (N,).
        bias: (N,), for its dtype alone.
        eps: Added to the variance.
        dtype: Of dx.

    Returns:
        dx (M, N), which includes dh; dweight and dbias (N,), in the dtypes of weight and bias.
    """
    made = dx, dweight, dbias = _alloc_backward(h, weight, bias, dtype)
    if h.shape[0] == 0:
        return dx, dweight.zero_(), dbias.zero_()
    sums = run_backward(dx, dy, dh, h, weight, eps)
    column_sums.run([(sums[:, 0], dweight), (sums[:, 1], dbias)])
    return made


@layer_norm_backward.register_fake
def _(dy, dh, h, weight, bias, eps, dtype):
    return _alloc_backward(h, weight, bias, dtype)


layer_norm_backward.register_flops(_dispatch.no_flops)


def _save(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, ctx.out_dtype = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, bias)
    ctx.res_dtype = None if residual is None else residual.dtype
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)  # no zeros for an h that nothing reads


def _backward(ctx, dy, dh):
    h, weight, bias = ctx.saved_tensors
    dh = None if ctx.res_dtype is None else dh  # without a residual h is empty
    if dy is None:  # no gradient reaches the normalisation
        grads = (None if dh is None else dh.to(dtype) for dtype in (ctx.dtype, ctx.res_dtype))
        return *grads, *(None,) * 4
    if torch.is_grad_enabled():  # a second derivative is wanted

        def forward(h, weight, bias):
            return layer_norm_reference(h.float(), weight.float(), bias.float(), ctx.eps)

        dx, dw, db = _dispatch.differentiable(forward, (h, weight, bias), dy.float())
        dx = dx if dh is None else dx + dh
    else:
        dy, dh = dy.contiguous(), None if dh is None else dh.contiguous()
        dtype = torch.promote_types(ctx.dtype, ctx.res_dtype or ctx.dtype)
        dx, dw, db = layer_norm_backward(dy, dh, h, weight, bias, ctx.eps, dtype)
    dres = None if ctx.res_dtype is None or dx is None else dx.to(ctx.res_dtype)
    dtypes = (ctx.dtype, weight.dtype, bias.dtype)
    dx, dw, db = (
        t if t is None else t.to(dtype) for t, dtype in zip((dx, dw, db), dtypes, strict=True)
    )
    return dx, dres, dw, db, None, None


_fwd.register_autograd(_backward, setup_context=_save)


def check_operands(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor
) -> None:
    """Raise ValueError unless shapes and devices fit."""
    N = x.shape[-1] if x.dim() else 0
    if not 0 < N <= MAX_N:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, expected (..., N) with 0 < N <= {MAX_N}"
        )
    _checks.expect(op, x, residual=(residual, x.shape), weight=(weight, (N,)), bias=(bias, (N,)))


def contiguous_operands(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The operands as the kernel reads them: contiguous rows and vectors."""
    N = x.shape[-1]
    residual = None if residual is None else residual.reshape(-1, N).contiguous()
    return x.reshape(-1, N).contiguous(), residual, weight.contiguous(), bias.contiguous()


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., N), N <= 8192. It and the others in fp32, fp16 or bf16, mixed freely.
        weight: (N,).
        bias: (N,).
        eps: Added to the variance.
        out_dtype: Of the result; None: x's dtype (fp32 under autocast, as in PyTorch).
        implementation: "auto" | "triton" | "torch".

    Returns:
        (..., N) in `out_dtype`.

    Raises:
        ValueError: For shapes and devices that do not fit.
        TypeError: For a dtype that the kernel does not take.
        RuntimeError: For "triton" where no kernel can run.
    """
    chosen = _policy.resolve("layer_norm", x, implementation)
    check_operands("layer_norm", x, None, weight, bias)
    if chosen == "torch":
        y = layer_norm_reference(x, weight, bias, eps)
        return y if out_dtype is None else y.to(out_dtype)
    if out_dtype is None:
        out_dtype = x.dtype if _checks.autocast_dtype(x) is None else torch.float32
    return _fwd(*contiguous_operands(x, None, weight, bias), eps, out_dtype)[0].view(x.shape)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`(layer_norm(x + residual), x + residual)` in one kernel.

    Args:
        x: (..., N), N <= 8192. It and the others in fp32, fp16 or bf16, mixed freely.
        residual: (..., N).
        weight: (N,).
        bias: (N,).
        eps: Added to the variance.
        implementation: "auto" | "triton" | "torch".

    Returns:
        Both (..., N). The sum has the promoted dtype of x and residual, and is rounded before it is
        normalised. The normalised rows have the sum's dtype (fp32 under autocast, as in PyTorch).

    Raises:
        ValueError: For shapes and devices that do not fit.
        TypeError: For a dtype that the kernel does not take.
        RuntimeError: For "triton" where no kernel can run.
    """
    chosen = _policy.resolve("add_layer_norm", x, implementation)
    check_operands("add_layer_norm", x, residual, weight, bias)
    if chosen == "torch":
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    out_dtype = torch.promote_types(x.dtype, residual.dtype)
    if _checks.autocast_dtype(x) is not None:
        out_dtype = torch.float32
    y, h = _fwd(*contiguous_operands(x, residual, weight, bias), eps, out_dtype)
    return y.view(x.shape), h.view(x.shape)
