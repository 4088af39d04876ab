"""Final norm of the prefix tokens, one or two heads and their fusion, in one operation.

    z_t = layer_norm(x[:, t]) @ W_t^T + b_t            t = 0: class token, t = 1: distillation token
    joint          (z_0 + z_1) / 2                     timm and the official code, at inference
    joint_softmax  softmax(z_0) + softmax(z_1)         DeiT paper, section 4; sums to 2
    class          z_0          distill          z_1

Only T rows per sample are normalised, not N. x (B, N, D), W_t (classes, D). LayerNorm and sums are
fp32. The normalised row is rounded to W's dtype, as the input of any GEMM is; the result is rounded
once, to W's dtype. With gradients the parts run, layer_norm and linear on those rows, with their
backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _dispatch, _explain, _plans, _policy
from .layer_norm import layer_norm, layer_norm_reference
from .linear import linear, linear_reference

FUSIONS = ("joint", "joint_softmax", "class", "distill")


def classifier_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, head_weight: Tensor,
    head_bias: Tensor | None = None, dist_weight: Tensor | None = None,
    dist_bias: Tensor | None = None, fusion: str = "joint", eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """`classifier` in PyTorch's operations: the definition of right."""
    y = layer_norm_reference(x[:, :2], norm_weight, norm_bias, eps)
    heads = [(head_weight, head_bias), (dist_weight, dist_bias)]
    tokens = _tokens(fusion, dist_weight is not None)
    logits = [linear_reference(y[:, t], *heads[t]) for t in tokens]  # type: ignore[arg-type]  # those heads are there
    return fuse(fusion, logits)


def fuse(fusion: str, logits: list[Tensor]) -> Tensor:
    """One prediction (B, classes) from the logits of each head, (B, classes) each."""
    if len(logits) == 1:
        return logits[0]
    if fusion == "joint_softmax":
        return logits[0].softmax(-1) + logits[1].softmax(-1)
    return (logits[0] + logits[1]) / 2


def _tokens(fusion: str, distilled: bool) -> range:
    """The prefix tokens, and so the heads, that a fusion reads."""
    if not distilled:
        return range(1)
    return {"class": range(1), "distill": range(1, 2)}.get(fusion, range(2))


@triton.jit
def _classifier_kernel(
    x_ptr, nw_ptr, nb_ptr, w0_ptr, b0_ptr, w1_ptr, b1_ptr,  # in; b0, w1, b1 may be None
    y_ptr,  # out: (B, classes), or (2, B, classes) where SEPARATE
    B, C, x_batch, eps, factor,
    D: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, SEPARATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(C, BLOCK_N)
    tile_m = (tl.program_id(0) // tiles_n).to(tl.int64)  # int64: B * N * D may exceed 2**31
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    in_rows, in_cols = rows < B, cols < C
    safe_cols = tl.where(in_cols, cols, 0).to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in tl.static_range(FIRST, LAST):
        w_ptr = w0_ptr if t == 0 else w1_ptr
        b_ptr = b0_ptr if t == 0 else b1_ptr
        x_ptrs = x_ptr + (rows * x_batch)[:, None] + t * D + ks[None, :]
        # row statistics first; the row is in the cache for the matmul
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for k in range(0, D, BLOCK_K):
            mask = in_rows[:, None] & (k + ks < D)[None, :]
            row_sum += tl.sum(tl.load(x_ptrs + k, mask=mask, other=0.0).to(tl.float32), axis=1)
        mean = row_sum / D
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for k in range(0, D, BLOCK_K):
            mask = in_rows[:, None] & (k + ks < D)[None, :]
            x = tl.load(x_ptrs + k, mask=mask, other=0.0).to(tl.float32)
            diff = tl.where(mask, x - mean[:, None], 0.0)
            squares += tl.sum(diff * diff, axis=1)
        rstd = tl.rsqrt(squares / D + eps)

        for k in range(0, D, BLOCK_K):
            in_k = k + ks < D
            mask = in_rows[:, None] & in_k[None, :]
            x = tl.load(x_ptrs + k, mask=mask, other=0.0).to(tl.float32)
            nw = tl.load(nw_ptr + k + ks, mask=in_k, other=0.0).to(tl.float32)
            nb = tl.load(nb_ptr + k + ks, mask=in_k, other=0.0).to(tl.float32)
            w = tl.load(
                w_ptr + safe_cols[None, :] * D + (k + ks)[:, None], mask=in_k[:, None], other=0.0
            )
            y = (x - mean[:, None]) * rstd[:, None] * nw[None, :] + nb[None, :]
            acc = tl.dot(y.to(w.dtype), w, acc, input_precision="ieee")
        if b_ptr is not None:
            acc += tl.load(b_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        if SEPARATE:
            y_offs = (t * B + rows)[:, None] * C + cols[None, :]
            tl.store(y_ptr + y_offs, acc, mask=in_rows[:, None] & in_cols[None, :])
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if not SEPARATE:
        y_offs = rows[:, None] * C + cols[None, :]
        tl.store(y_ptr + y_offs, acc * factor, mask=in_rows[:, None] & in_cols[None, :])


def meta(dtype: torch.dtype) -> dict:
    """Tiles by rule: small, so that 256 images x 1000 classes are 256 programs; latency decides."""
    N, K = (32, 32) if dtype == torch.float32 else (64, 64)  # fp32 operands take registers too
    return {"BLOCK_M": 16, "BLOCK_N": N, "BLOCK_K": K, "num_warps": 4, "num_stages": 3}


def _alloc(x, head_weight):
    """What forward returns; also its fake, so the two cannot differ."""
    return head_weight.new_empty(x.shape[0], head_weight.shape[0])


@_dispatch.custom_op("deit_fast::classifier")
def _fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    dist_weight: Tensor | None,
    dist_bias: Tensor | None,
    fusion: str,
    eps: float,
) -> Tensor:
    y = _alloc(x, head_weight)
    (B, C), D = y.shape, x.shape[2]
    if y.numel() == 0:
        return y
    tokens = _tokens(fusion, dist_weight is not None)
    separate = len(tokens) == 2 and fusion == "joint_softmax"
    out = y.new_empty(2, B, C, dtype=torch.float32) if separate else y
    config = meta(head_weight.dtype)
    grid = (_dispatch.cdiv(B, config["BLOCK_M"]) * _dispatch.cdiv(C, config["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        _plans.launch(_classifier_kernel, grid,
            x, norm_weight, norm_bias, head_weight, head_bias, dist_weight, dist_bias, out,
            B, C, x.stride(0), eps, 1.0 / len(tokens),
            D=D, FIRST=tokens[0], LAST=tokens[-1] + 1, SEPARATE=separate, **config,
        )  # fmt: skip
    return fuse(fusion, [out[0], out[1]]).to(y.dtype) if separate else y


@_fwd.register_fake
def _(x, norm_weight, norm_bias, head_weight, head_bias, dist_weight, dist_bias, fusion, eps):
    return _alloc(x, head_weight)


@_fwd.register_flops
def _(x, g, h, head_weight, head_bias, dist_weight, dist_bias, fusion, *args, **kwargs):
    B, (classes, D) = x[0], head_weight
    return 2 * B * D * classes * len(_tokens(fusion, dist_weight is not None))


def classifier(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    dist_weight: Tensor | None = None,
    dist_bias: Tensor | None = None,
    fusion: str = "joint",
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Tensor:
    """Logits (or, for "joint_softmax", summed probabilities) from the prefix tokens of x.

    DeiT paper, section 4, "Classification with our approach".

    Args:
        x: (B, N, D), before the final norm. Row 0 is the class token, row 1 the distillation token
            where `dist_weight` is given.
        norm_weight: (D,).
        norm_bias: (D,).
        head_weight: (classes, D).
        head_bias: (classes,).
        dist_weight: (classes, D), of the distillation head.
        dist_bias: (classes,).
        fusion: "joint" | "joint_softmax" | "class" | "distill". With one head "joint" or "class".
        eps: Added to the variance.
        implementation: "auto" | "triton" | "torch".

    Returns:
        (B, classes) in head_weight's dtype; under autocast in autocast's (then the softmax of
        "torch" is fp32).

    Raises:
        ValueError: For shapes, devices and fusions that do not fit.
        TypeError: For a dtype that the kernel does not take.
        RuntimeError: For "triton" where no kernel can run.
    """
    chosen = _policy.resolve("classifier", x, implementation)
    distilled = dist_weight is not None
    if fusion not in (FUSIONS if distilled else ("joint", "class")):
        raise ValueError(
            f"classifier: fusion {fusion!r} with {1 + distilled} head(s), "
            f"expected one of {FUSIONS if distilled else ('joint', 'class')}"
        )
    if x.dim() != 3 or x.shape[1] < 1 + distilled or head_weight.dim() != 2:
        raise ValueError(
            f"classifier: x has shape {tuple(x.shape)} and head_weight {tuple(head_weight.shape)}, "
            f"expected (B, N, D) with N >= {1 + distilled} and (classes, D)"
        )
    D, C = x.shape[2], head_weight.shape[0]
    _checks.expect(
        "classifier", x, norm_weight=(norm_weight, (D,)), norm_bias=(norm_bias, (D,)),
        head_weight=(head_weight, (C, D)), head_bias=(head_bias, (C,)),
        dist_weight=(dist_weight, (C, D)), dist_bias=(dist_bias, (C,)),
    )  # fmt: skip
    if chosen == "torch":
        return classifier_reference(
            x, norm_weight, norm_bias, head_weight, head_bias, dist_weight, dist_bias, fusion, eps
        )
    heads = _checks.cast(_checks.autocast_dtype(x), head_weight, head_bias, dist_weight, dist_bias)
    if _dispatch.wants_grad(x, norm_weight, norm_bias, *heads):
        if _explain.decisions is not None:
            _explain.record("classifier", "parts", "gradients are wanted: the kernel has none")
        tokens = _tokens(fusion, distilled)
        y = x[:, tokens[0] : tokens[-1] + 1]
        y = layer_norm(y, norm_weight, norm_bias, eps, heads[0].dtype, implementation)
        logits = [
            linear(y[:, i], heads[2 * t], heads[2 * t + 1], implementation=implementation)
            for i, t in enumerate(tokens)
        ]
        # linear gives tensors without return_row_stats; softmax under autocast gives fp32
        return fuse(fusion, logits).to(heads[0].dtype)  # type: ignore[arg-type]
    rest = [t if t is None else t.contiguous() for t in (norm_weight, norm_bias, *heads)]
    if x.stride(2) != 1 or x.stride(1) != D:  # the prefix rows of a wider buffer need no copy
        x = x[:, : 1 + distilled].contiguous()
    return _fwd(x, *rest, fusion, eps)
