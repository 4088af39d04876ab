"""Convolution, batch norm with running statistics, residual and GELU: TinyViT's ConvNorm.

    y = act(BN(conv(x)) [+ residual])      BN(z) = z * s + t
    s = weight / sqrt(var + eps)           t = bias - mean * s      one of each per output channel

The convolution decides between three ways. All work on channels_last maps:
    1 x 1, stride 1   a GEMM of the pixels with s * W, everything else in its epilogue (`linear`)
    depthwise 3 x 3   one memory-bound kernel: a square of outputs of some channels, all fused
    any other         PyTorch's convolution with s * W and t; then residual and GELU
A small kernel folds s into W at each call. W is small beside the maps, and this way a weight may
change at any time.

B images, C channels of Y x X pixels, D output channels of Y' x X'. x (B, C, Y, X), W (D, C /
groups, k, k), the norm's four vectors (D,), residual and y (B, D, Y', X'), y channels_last. Sums
are fp32 and round once, to y's dtype; GELU is that of `linear`. PyTorch rounds after the
convolution too. For inference only: where a gradient is wanted the reference runs.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _dispatch, _explain, _plans, _policy
from .linear import ACTIVATIONS
from .linear.epilogue import _gelu
from .linear.forward import run

CHANNELS_LAST = torch.channels_last


def conv_norm_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor,
    eps: float = 1e-5, stride: int = 1, padding: int = 0, groups: int = 1,
    activation: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`conv_norm` in PyTorch's operations: the definition of right."""
    y = F.conv2d(x, weight, None, stride, padding, 1, groups)
    y = F.batch_norm(y, mean, var, norm_weight, norm_bias, False, 0.0, eps)
    y = y if residual is None else y + residual.to(y.dtype)
    return F.gelu(y) if activation == "gelu" else y


@triton.jit
def _scale_and_shift(norm, cols, mask, eps):
    """Scale s and shift t of some output channels."""
    weight_ptr, bias_ptr, mean_ptr, var_ptr = norm
    var = tl.load(var_ptr + cols, mask=mask, other=1.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    scale = weight * tl.rsqrt(var + eps)
    return scale, tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32) - mean * scale


@triton.jit
def _fold_batch_norm_kernel(
    w_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,  # in: (D, K), (D,) each
    folded_ptr, shift_ptr,  # out: (D, K), (D,)
    K, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0)
    norm = (weight_ptr, bias_ptr, mean_ptr, var_ptr)
    scale, shift = _scale_and_shift(norm, d, d >= 0, eps)
    tl.store(shift_ptr + d, shift)
    for first in range(0, K, BLOCK):
        ks = first + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + d * K + ks, mask=ks < K, other=0.0).to(tl.float32)
        tl.store(folded_ptr + d * K + ks, w * scale, mask=ks < K)


@triton.jit
def _depthwise_conv_kernel(
    x_ptr, w_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,  # in: (B, Y, X, C), (C, 9), (C,) each
    res_ptr,  # in: (B, Y', X', C) or None
    y_ptr,  # out: (B, Y', X', C)
    C, Y, X, Y_OUT, X_OUT, eps,
    STRIDE: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """TILE x TILE outputs of BLOCK_C channels.

    Neighbours share most of their nine inputs, which then come from the cache.
    """
    pid = tl.program_id(0)
    blocks, across, down = tl.cdiv(C, BLOCK_C), tl.cdiv(X_OUT, TILE), tl.cdiv(Y_OUT, TILE)
    channels = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = pid // blocks
    pixel = tl.arange(0, TILE * TILE)
    x_out = tile % across * TILE + pixel % TILE
    y_out = tile // across % down * TILE + pixel // TILE
    sample = (tile // (across * down)).to(tl.int64)  # a batch may exceed 2**31 elements
    x_ptr += sample * Y * X * C
    in_channels = channels < C
    acc = tl.zeros((TILE * TILE, BLOCK_C), tl.float32)
    for tap in tl.static_range(9):
        y_in, x_in = y_out * STRIDE + (tap // 3 - 1), x_out * STRIDE + (tap % 3 - 1)
        inside = (y_in >= 0) & (y_in < Y) & (x_in >= 0) & (x_in < X)
        x = tl.load(
            x_ptr + ((y_in * X + x_in) * C)[:, None] + channels[None, :],
            mask=inside[:, None] & in_channels[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(w_ptr + channels * 9 + tap, mask=in_channels, other=0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
    norm = (weight_ptr, bias_ptr, mean_ptr, var_ptr)
    scale, shift = _scale_and_shift(norm, channels, in_channels, eps)
    acc = acc * scale[None, :] + shift[None, :]
    offs = sample * Y_OUT * X_OUT * C + ((y_out * X_OUT + x_out) * C)[:, None] + channels[None, :]
    mask = ((y_out < Y_OUT) & (x_out < X_OUT))[:, None] & in_channels[None, :]
    if res_ptr is not None:
        acc += tl.load(res_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        acc = _gelu(acc, EXACT)
    tl.store(y_ptr + offs, acc, mask=mask)


FOLD_META = {"BLOCK": 256, "num_warps": 1}
# 64 pixels x 32 channels: whole 32-byte sectors in any dtype, and TinyViT's are all multiples of 32
DEPTHWISE_META = {"TILE": 8, "BLOCK_C": 32, "num_warps": 4}


def _alloc(x, weight, stride, padding):
    """y, channels_last; also its fake."""
    B, _, Y, X = x.shape
    D, _, k, _ = weight.shape
    Y, X = ((n + 2 * padding - k) // stride + 1 for n in (Y, X))
    return x.new_empty(B, Y, X, D).permute(0, 3, 1, 2)


@_dispatch.custom_op("deit_fast::conv_norm")
def _fwd(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor,
    residual: Tensor | None, eps: float, stride: int, padding: int, groups: int, activation: str,
    implementation: str,
) -> Tensor:  # fmt: skip
    y = _alloc(x, weight, stride, padding)
    norm = (norm_weight, norm_bias, mean, var)
    if not y.numel():
        return y
    B, C, Y, X = x.shape
    D, _, k, _ = weight.shape
    exact = x.dtype == torch.float32
    fits = max(x[0].numel(), y[0].numel()) < 2**31  # offsets inside a sample are 32-bit
    if groups == C == D and k == 3 and padding == 1 and stride in (1, 2) and fits:
        _, _, Y_out, X_out = y.shape
        tile, block = DEPTHWISE_META["TILE"], DEPTHWISE_META["BLOCK_C"]
        tiles = _dispatch.cdiv(Y_out, tile) * _dispatch.cdiv(X_out, tile) * _dispatch.cdiv(C, block)
        with torch.cuda.device_of(x):
            _plans.launch(_depthwise_conv_kernel, (B * tiles,),
                x, weight, *norm, residual, y, C, Y, X, Y_out, X_out, eps, STRIDE=stride,
                GELU=activation == "gelu", EXACT=exact, **DEPTHWISE_META,
            )  # fmt: skip
        return y
    is_gemm = k == stride == groups == 1 and padding == 0
    folded = weight.new_empty(weight.shape, dtype=x.dtype)
    shift = x.new_empty(D, dtype=torch.float32 if is_gemm else x.dtype)
    with torch.cuda.device_of(x):
        _plans.launch(
            _fold_batch_norm_kernel, (D,),
            weight, *norm, folded, shift, weight[0].numel(), eps, **FOLD_META,
        )  # fmt: skip
    if is_gemm:
        last = "gelu_last" if residual is not None and activation == "gelu" else activation
        rows = None if residual is None else _rows(residual)
        run(
            _rows(y), _rows(x), folded.view(D, C), shift, rows, activation=last,
            implementation=implementation,
        )  # fmt: skip
        return y
    folded = folded.contiguous(memory_format=CHANNELS_LAST)
    y = F.conv2d(x, folded, shift, stride, padding, 1, groups).contiguous(
        memory_format=CHANNELS_LAST
    )
    y = y if residual is None else y.add_(residual)
    return torch.ops.aten.gelu_(y) if activation == "gelu" else y


@_fwd.register_fake
def _(x, weight, g, b, m, v, residual, eps, stride, padding, groups, activation, implementation):
    return _alloc(x, weight, stride, padding)


@_fwd.register_flops
def _(x, weight, *args, out_shape):
    return 2 * math.prod(out_shape) * math.prod(weight[1:])  # C / groups, k, k


def _rows(x):
    """(B, C, Y, X), channels_last, as (B * Y * X, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def conv_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-5,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`activation(batch_norm(conv2d(x, weight)) + residual)` with the running statistics.

    Inputs that require gradients get the reference.

    Args:
        x: (B, C, Y, X), best channels_last; fp32, fp16 or bf16.
        weight: (D, C / groups, k, k) in x's dtype; under autocast both are cast to its dtype.
        norm_weight: (D,), here and below in any of these dtypes.
        norm_bias: (D,).
        mean: (D,), the running mean.
        var: (D,), the running variance.
        eps: Added to the variance.
        stride: In pixels, the same in both directions.
        padding: In pixels, the same in both directions.
        groups: Of channels.
        activation: "none" | "gelu", as in `linear`, after the residual.
        residual: Of the result's shape.
        implementation: "auto" | "triton" | "torch".

    Returns:
        (B, D, Y', X') in x's dtype; channels_last from the kernels.

    Raises:
        ValueError: For shapes, devices and names that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" where no kernel can run.
    """
    chosen = _policy.resolve("conv_norm", x, implementation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv_norm: activation {activation!r}, expected one of {ACTIVATIONS}")
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"conv_norm: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (B, C, Y, X) and (D, C / groups, k, k)"
        )
    D, k = weight.shape[0], weight.shape[2]
    B, C, Y, X = x.shape
    if C % groups or D % groups or min(Y, X) + 2 * padding < k or stride < 1 or padding < 0:
        raise ValueError(
            f"conv_norm: {C} channels of {Y} x {X} to {D} in {groups} groups, stride {stride}, "
            f"padding {padding}: no such convolution"
        )
    dtype = _checks.autocast_dtype(x)
    x, weight = _checks.cast(dtype, x, weight)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "mean": mean, "var": var}
    named = {name: (t, (D,)) for name, t in norm.items()}
    _checks.expect("conv_norm", x, **named)
    _checks.expect("conv_norm", x, x.dtype, weight=(weight, (D, C // groups, k, k)))
    vectors = tuple(norm.values())
    if residual is not None:
        Y, X = ((n + 2 * padding - k) // stride + 1 for n in (Y, X))
        _checks.expect("conv_norm", x, residual=(residual, (B, D, Y, X)))
    if chosen == "torch" or _dispatch.wants_grad(x, weight, *vectors, residual):
        if _explain.decisions is not None and chosen != "torch":
            _explain.record("conv_norm", "torch", "gradients are wanted: the kernels have none")
        return conv_norm_reference(
            x, weight, norm_weight, norm_bias, mean, var, eps, stride, padding, groups, activation,
            residual,
        )  # fmt: skip
    x = x.contiguous(memory_format=CHANNELS_LAST)
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)
    return _fwd(
        x, weight.contiguous(), *(t.contiguous() for t in vectors), residual, eps, stride, padding,
        groups, activation, implementation,
    )  # fmt: skip
