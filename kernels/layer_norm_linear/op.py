"""The operators of `layer_norm_linear`, which of them serves, and the public function."""

import math

import torch
from torch import Tensor

from .. import _checks, _dispatch, _explain, _policy
from ..layer_norm import MAX_N, layer_norm
from ..linear import ACTIVATIONS, linear
from . import configs, fold, prologue

IMPLEMENTATIONS = ("auto", "prologue", "fold", "separate", "triton", "cublas", "torch")


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
    if y.numel():
        fold.run(y, x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation)
    return y


@_fwd.register_fake
def _(x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation):
    return x.new_empty(x.shape[0], weight.shape[0])


@_fwd.register_flops
def _(x, norm_weight, norm_bias, weight, *args, **kwargs):
    (M, K), N = x, weight[0]
    return 2 * M * N * K


@_dispatch.custom_op("deit_fast::layer_norm_linear_prologue")
def _prologue(
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
    if y.numel():
        prologue.run(y, x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation)
    return y


@_prologue.register_fake
def _(x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation):
    return x.new_empty(x.shape[0], weight.shape[0])


@_prologue.register_flops
def _(x, norm_weight, norm_bias, weight, *args, **kwargs):
    (M, K), N = x, weight[0]
    return 2 * M * N * K


def _choose(
    x: Tensor, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], rows: int,
    row_stats: Tensor | None, implementation: str,
) -> tuple[str, str]:  # fmt: skip
    """Which serves, "prologue", "fold" or "separate", and why."""
    if _dispatch.wants_grad(x, *tensors):
        return "separate", "gradients are wanted: it has none"
    dtype = _checks.autocast_dtype(x) or x.dtype
    if x.dtype not in (torch.float16, torch.bfloat16) or dtype != x.dtype:
        return "separate", f"x is {x.dtype} and the GEMM {dtype}: it takes one half precision"
    if implementation in ("prologue", "fold", "separate"):
        return implementation, _explain.ASKED
    allowed = ("triton", "cublas", "torch")
    if _policy.resolve("linear", x, implementation, allowed, record=False) != "triton":
        return "separate", "Triton does not serve the GEMM"
    if "layer_norm_linear" in _policy.excluded():
        return "separate", _policy.EXCLUDED
    weight = tensors[2]
    found = configs.by_table(x, weight, rows, dtype)
    if found == "separate":
        return found, "measured slower on this chip"
    if found == "prologue" or found is None and configs.is_small(x, rows, weight):
        return "prologue", "normalised as the GEMM loads it"
    features = weight.shape[0]
    few = not _dispatch.at_least(rows, (8 if row_stats is None else 2) * features)
    if found is None and few:
        return "separate", "rows are few: folding W would cost more than normalising x"
    return "fold", "folded into the GEMM"


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
        implementation: "auto" and "triton" take what the module's docstring and tuned tables say,
            "prologue" and "fold" insist; "separate" runs the two operations, and so do "cublas" and
            "torch", which then serve the GEMM.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: For shapes, devices and names that do not fit, or for "prologue" and "fold"
            where they cannot be.
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
    chosen, reason = _choose(x, tensors, rows, row_stats, implementation)
    if _explain.decisions is not None:
        _explain.record("layer_norm_linear", chosen, reason)
    insists = implementation in ("prologue", "fold")
    if chosen != "separate":
        dtype = _checks.autocast_dtype(x)
        weight, bias = _checks.cast(dtype, weight, bias)
        _checks.expect("layer_norm_linear", x, x.dtype, weight=(weight, (N, K)), bias=(bias, (N,)))
        if insists:
            _policy.resolve("linear", x, "triton", record=False)
        operands = (norm_weight, norm_bias, weight, bias, row_stats)
        contiguous = (t if t is None else t.contiguous() for t in operands)
        serve = _prologue if chosen == "prologue" else _fwd
        return serve(x.reshape(-1, K).contiguous(), *contiguous, eps, activation).view(*lead, N)
    if insists:
        raise ValueError(f"layer_norm_linear: implementation {implementation!r}, but {reason}")
    # under autocast the GEMM rounds its input anyway: the LayerNorm writes it rounded
    gemm_by = "auto" if implementation == "separate" else implementation
    norm_by = "triton" if implementation == "cublas" else gemm_by
    y = layer_norm(x, norm_weight, norm_bias, eps, _checks.autocast_dtype(x), norm_by)
    # without return_row_stats a tensor
    return linear(y, weight, bias, activation, implementation=gemm_by)  # type: ignore[return-value]
