"""LayerNorm followed by a linear layer, with the normalisation folded into the GEMM.

    y = act(LN(x) @ W^T + b)   with   LN(x) = (x - mean) * rstd * g + h
      = act(rstd * u * (x @ W'^T - mean * s) + b')
    W' = round(W * g / u)      s = rowsum(W')      b' = b + W @ h

g and h are LayerNorm's weight and bias. The GEMM reads x itself, its epilogue does the rest, and
the normalised x is never written. W' and s are computed at each call, so that a change of the
weights is seen: 4 N K bytes, where a LayerNorm moves 4 M K. The unit u, the power of two below the
largest of |g|, keeps W' of a small g out of fp16's subnormal numbers. s sums the *rounded* W', and
the mean is subtracted from the fp32 accumulator. x is rounded once instead of twice, so the error
is below that of the separate operations, also where channels or means are far from zero
(docs/performance.md).

mean and rstd come from the row statistics that `linear(..., return_row_stats=True)` returns beside
x, or from a kernel over x. M rows, K -> N features: x (M, K), W (N, K), g and h (K,), b (N,); row
statistics (P, 2, M) in fp32: mean and sum of squared differences from it, of each of P equal parts
of a row. Half precision and inference only. With gradients, in fp32, under autocast with an fp32 x,
and where M is small beside N, the two operations run one after the other.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _dispatch, _explain, _policy, _tuned
from .layer_norm import MAX_N, layer_norm, layer_norm_reference, meta
from .linear import ACTIVATIONS, linear, linear_reference
from .linear.forward import run

IMPLEMENTATIONS = ("auto", "fold", "triton", "cublas", "torch")


def layer_norm_linear_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None,
    eps: float = 1e-6, activation: str = "none",
) -> Tensor:  # fmt: skip
    """`layer_norm_linear` in PyTorch's operations: the definition of right."""
    y = layer_norm_reference(x, norm_weight, norm_bias, eps)
    return linear_reference(y, weight, bias, activation)


@triton.jit
def _fold_layer_norm_kernel(
    w_ptr, b_ptr, g_ptr, h_ptr,  # in: (N, K) (N,) or None (K,) (K,)
    w_out_ptr, b_out_ptr, s_ptr,  # out: (N, K) (N,) (N + 1,), the last two fp32; s[N] is u
    N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < N, cols < K
    mask = in_rows[:, None] & in_cols[None, :]
    offs = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    shift = tl.sum(w * h[None, :], axis=1)
    if b_ptr is not None:
        shift += tl.load(b_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(g), axis=0)
    u = tl.exp2(tl.floor(tl.log2(tl.where(largest > 0.0, largest, 1.0))))
    folded = (w * (g / u)[None, :]).to(w_out_ptr.dtype.element_ty)
    tl.store(w_out_ptr + offs, folded, mask=mask)
    tl.store(b_out_ptr + rows, shift, mask=in_rows)
    tl.store(s_ptr + rows, tl.sum(folded.to(tl.float32), axis=1), mask=in_rows)
    if tl.program_id(0) == 0:
        tl.store(s_ptr + N, u)


@triton.jit
def _row_stats_kernel(
    x_ptr,  # in: (M, K)
    row_stats_ptr,  # out: (1, 2, M)
    M, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # int64: M * K may exceed 2**31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / K
    diff = tl.where(mask, x - mean[:, None], 0.0)
    tl.store(row_stats_ptr + rows, mean, mask=rows < M)
    tl.store(row_stats_ptr + M + rows, tl.sum(diff * diff, axis=1), mask=rows < M)


@_dispatch.custom_op("deit_fast::layer_norm_linear")
def _fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_stats: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    (M, K), N = x.shape, weight.shape[0]
    if y.numel() == 0:
        return y
    config = meta(K)
    folded = torch.empty_like(weight)
    shift, sums = (x.new_empty(n, dtype=torch.float32) for n in (N, N + 1))
    with torch.cuda.device_of(x):
        if row_stats is None:
            row_stats = x.new_empty(1, 2, M, dtype=torch.float32)
            _row_stats_kernel[(_dispatch.cdiv(M, config["BLOCK_M"]),)](x, row_stats, M, K, **config)
        _fold_layer_norm_kernel[(_dispatch.cdiv(N, config["BLOCK_M"]),)](
            weight, bias, norm_weight, norm_bias, folded, shift, sums, N, K, **config
        )
    run(y, x, folded, shift, activation=activation, row_stats=row_stats, column_sums=sums, eps=eps)
    return y


@_fwd.register_fake
def _(x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation):
    return x.new_empty(x.shape[0], weight.shape[0])


@_fwd.register_flops
def _(x, norm_weight, norm_bias, weight, *args, **kwargs):
    (M, K), N = x, weight[0]
    return 2 * M * N * K


@_tuned.validates("layer_norm_linear")
def _why_not(shape, choice, capability):
    return _tuned.check_choice(choice, ("fold", "separate"), ())


def uses_row_stats(x: Tensor, weight: Tensor) -> bool:
    """Whether neither a tuned table nor an exclusion rules out folding LayerNorm into `weight`.

    Args:
        x: Rows of the dtype and device that would be folded.
        weight: (N, K).
    """
    if "layer_norm_linear" in _policy.excluded():
        return False
    N, K = weight.shape
    dtype = _checks.autocast_dtype(x) or x.dtype
    return _tuned.implementation("layer_norm_linear", weight, x, dtype, K=K, N=N) != "separate"


def _why_not_fold(
    x: Tensor, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], rows: int,
    row_stats: Tensor | None, implementation: str,
) -> str | None:  # fmt: skip
    """Why the normalisation cannot or should not be folded here; None: it is."""
    if _dispatch.wants_grad(x, *tensors):
        return "gradients are wanted: it has none"
    dtype = _checks.autocast_dtype(x) or x.dtype
    if x.dtype not in (torch.float16, torch.bfloat16) or dtype != x.dtype:
        return f"x is {x.dtype} and the GEMM {dtype}: it takes one half precision"
    if implementation == "fold":
        return None
    allowed = ("triton", "cublas", "torch")
    if _policy.resolve("linear", x, implementation, allowed, record=False) != "triton":
        return "Triton does not serve the GEMM"
    if "layer_norm_linear" in _policy.excluded():
        return _policy.EXCLUDED
    if not uses_row_stats(x, tensors[2]):
        return "measured slower on this chip"
    features = tensors[2].shape[0]
    if not _dispatch.at_least(rows, (8 if row_stats is None else 2) * features):
        return "rows are few: folding W would cost more than normalising x"
    return None


def _record(reason: str | None, implementation: str) -> None:
    """The decision for `deit_fast.kernels.explain`; `reason` is `_why_not_fold`'s."""
    if reason is None:
        reason = _explain.ASKED if implementation == "fold" else "folded into the GEMM"
        _explain.record("layer_norm_linear", "fold", reason)
    else:
        _explain.record("layer_norm_linear", "separate", reason)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    row_stats: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`activation(layer_norm(x) @ weight.T + bias)`.

    Args:
        x: (..., K), K <= 8192; dtypes as for `linear`.
        norm_weight: (K,).
        norm_bias: (K,).
        weight: (N, K).
        bias: (N,).
        eps: Added to the variance.
        activation: "none" | "gelu", as in `linear`.
        row_stats: (P, 2, rows) in fp32, as `linear(..., return_row_stats=True)` returned them with
            x. They are trusted.
        implementation: "auto" and "triton" fold the normalisation into the GEMM where the module's
            docstring and tuned tables say so, "fold" always, "cublas" and "torch" never.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: For shapes, devices and names that do not fit, or for "fold" where it cannot be.
        TypeError: For dtypes that do not fit.
        RuntimeError: For every choice but "auto" and "torch" where no kernel can run.
    """
    if weight.dim() != 2 or x.dim() < 1 or not 0 < weight.shape[1] <= MAX_N:
        raise ValueError(
            f"layer_norm_linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            f"expected (..., K) and (N, K) with 0 < K <= {MAX_N}"
        )
    (N, K), lead = weight.shape, x.shape[:-1]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"layer_norm_linear: implementation {implementation!r}, "
            f"expected one of {IMPLEMENTATIONS}"
        )
    if N * K >= 2**31:
        raise ValueError(
            f"layer_norm_linear: weight is {N} x {K}, expected fewer than 2**31 elements"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"layer_norm_linear: activation {activation!r}, expected one of {ACTIVATIONS}"
        )
    rows = math.prod(lead)
    _checks.expect(
        "layer_norm_linear", x, x=(x, (*lead, K)), norm_weight=(norm_weight, (K,)),
        norm_bias=(norm_bias, (K,)), bias=(bias, (N,)),
    )  # fmt: skip
    if row_stats is not None:
        parts = row_stats.shape[0] if row_stats.dim() == 3 else 1
        _checks.expect(
            "layer_norm_linear", x, torch.float32, row_stats=(row_stats, (parts, 2, rows))
        )
        if K % parts:
            raise ValueError(
                f"layer_norm_linear: row statistics of {parts} parts, expected a divisor of {K}"
            )
    tensors = (norm_weight, norm_bias, weight, bias)
    reason = _why_not_fold(x, tensors, rows, row_stats, implementation)
    if _explain.decisions is not None:
        _record(reason, implementation)
    if reason is None:
        dtype = _checks.autocast_dtype(x)
        weight, bias = _checks.cast(dtype, weight, bias)
        _checks.expect("layer_norm_linear", x, x.dtype, weight=(weight, (N, K)), bias=(bias, (N,)))
        if implementation == "fold":
            _policy.resolve("linear", x, "triton")
        operands = (norm_weight, norm_bias, weight, bias, row_stats)
        contiguous = (t if t is None else t.contiguous() for t in operands)
        return _fwd(x.reshape(-1, K).contiguous(), *contiguous, eps, activation).view(*lead, N)
    if implementation == "fold":
        raise ValueError(f"layer_norm_linear: implementation 'fold', but {reason}")
    # under autocast the GEMM rounds its input anyway: the LayerNorm writes it rounded
    norm_by = "triton" if implementation == "cublas" else implementation
    y = layer_norm(x, norm_weight, norm_bias, eps, _checks.autocast_dtype(x), norm_by)
    # without return_row_stats a tensor
    return linear(y, weight, bias, activation, implementation=implementation)  # type: ignore[return-value]
