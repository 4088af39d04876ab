"""Linear layer with everything that follows it inside a transformer block as its epilogue.

    z = x @ W^T + b
    a = z   or   gelu(z) = z * (1 + erf(z / sqrt(2))) / 2
    y = a * layer_scale * row_scale [+ residual]

Backward, with dz = dy * layer_scale * row_scale * gelu'(z):
    dx = dz @ W      dW = dz^T @ x      db = sum_rows(dz)
    dresidual = dy   dlayer_scale = sum_rows(dy * row_scale * a)

M rows, K input features, N output features, S samples of M / S rows each. Shapes: x (M, K), W (N,
K), b and layer_scale (N,), row_scale (S,) (stochastic depth: 0 or 1 / keep probability), residual
and y (M, N). Products accumulate in fp32; the epilogue is fp32 and rounds once, to y's dtype: the
residual's where there is one (autocast keeps that stream in fp32), x's otherwise. fp32 products
are IEEE fp32, never TF32. Saved for backward: the inputs; z is recomputed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _runtime

ACTIVATIONS = ("none", "gelu")


def linear_reference(
    x, weight, bias=None, activation="none", residual=None, layer_scale=None, row_scale=None
):
    y = F.linear(x, weight, bias)
    if activation == "gelu":
        y = F.gelu(y)
    if layer_scale is not None:
        y = y * layer_scale
    if row_scale is not None:
        y = y * row_scale.view(-1, *(1,) * (y.dim() - 1))
    return y if residual is None else residual + y


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile: its first row (int64: M * N may pass 2**31), rows left from there, local
    rows and columns. Offsets inside a tile stay 32-bit, which halves the registers they take.
    Neighbouring programs share a row block, so x comes from device memory once; W fits in L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return tile_m.to(tl.int64) * BLOCK_M, M - tile_m * BLOCK_M, tl.arange(0, BLOCK_M), cols


@triton.jit
def _epilogue(
    acc, first_row, left, rows, cols, b_ptr, res_ptr, ls_ptr, rs_ptr, y_ptr, N, rows_per_sample,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store y for one tile: acc is x @ W^T in fp32."""
    in_cols, in_rows = cols < N, rows < left
    mask = in_rows[:, None] & in_cols[None, :]
    offs = rows[:, None] * N + cols[None, :]
    if b_ptr is not None:
        acc += tl.load(b_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if ls_ptr is not None:
        acc *= tl.load(ls_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if rs_ptr is not None:
        sample = (first_row + rows) // rows_per_sample
        acc *= tl.load(rs_ptr + sample, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if res_ptr is not None:
        res = tl.load(res_ptr + first_row * N + offs, mask=mask, other=0.0)
        acc += res.to(tl.float32)
    tl.store(y_ptr + first_row * N + offs, acc, mask=mask)


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, b_ptr, res_ptr, ls_ptr, rs_ptr,  # in; the last four may be None
    y_ptr,  # out: (M, N)
    M, N, K, rows_per_sample,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row, left, rows, cols = _tile(M, N, BLOCK_M, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows and columns outside read the first ones and are not stored: no mask inside the loop.
    safe_rows = tl.where(rows < left, rows, 0)
    safe_cols = tl.where(cols < N, cols, 0)
    x_ptrs = x_ptr + first_row * K + (safe_rows[:, None] * K + ks[None, :])
    w_ptrs = w_ptr + (safe_cols[None, :] * K + ks[:, None])
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k + ks < K)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k + ks < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    _epilogue(
        acc, first_row, left, rows, cols, b_ptr, res_ptr, ls_ptr, rs_ptr, y_ptr, N,
        rows_per_sample, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _linear_epilogue_kernel(
    z_ptr, b_ptr, res_ptr, ls_ptr, rs_ptr,  # in; the last four may be None
    y_ptr,  # out: (M, N)
    M, N, rows_per_sample,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same epilogue as a pass of its own, behind a product from cuBLAS."""
    first_row, left, rows, cols = _tile(M, N, BLOCK_M, BLOCK_N)
    mask = (rows < left)[:, None] & (cols < N)[None, :]
    offs = rows[:, None] * N + cols[None, :]
    z = tl.load(z_ptr + first_row * N + offs, mask=mask, other=0.0).to(tl.float32)
    _epilogue(
        z, first_row, left, rows, cols, b_ptr, res_ptr, ls_ptr, rs_ptr, y_ptr, N,
        rows_per_sample, ACTIVATION,
    )  # fmt: skip


EPILOGUE_META = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}  # 8 elements (16 bytes) a thread


def meta(M: int, N: int, dtype: torch.dtype, capability: tuple[int, int], processors: int) -> dict:
    """Tiles by rule, until `tuned/` holds measured ones: the largest of three that still gives
    every multiprocessor a tile."""
    hopper = capability >= (9, 0)
    if dtype == torch.float32:  # FMA units: registers hold the operands too
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    # 128x128 in 8 warps: two CTAs a multiprocessor, one runs its epilogue behind the other's
    # product. Four warps, or 128x256 in eight, spill with the erf epilogue.
    depth = {"BLOCK_K": 64, "num_stages": 3} if hopper else {"BLOCK_K": 32, "num_stages": 4}
    large = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8} | depth
    # N = 192 and its like: 128 columns would idle a quarter of the last tile.
    narrow = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    small = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    for config in (large, narrow) if N % 128 == 0 else (narrow,):
        if triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]) >= processors:
            return config
    return small


def _device_meta(x, N):
    if not x.is_cuda:  # interpreter
        return meta(x.shape[0], N, x.dtype, (9, 0), 4)
    chip = torch.cuda.get_device_properties(x.device)
    return meta(x.shape[0], N, x.dtype, (chip.major, chip.minor), chip.multi_processor_count)


def _alloc(x, weight, residual):
    """What forward returns. Also its fake, so the two cannot disagree."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("deit_fast::linear", mutates_args=())
def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    activation: str,
    implementation: str,
) -> Tensor:
    y = _alloc(x, weight, residual)
    (M, K), N = x.shape, weight.shape[0]
    if y.numel() == 0:
        return y
    if N * K >= 2**31:
        raise ValueError(f"linear: weight has {N} x {K} elements, want fewer than 2**31")
    rows_per_sample = 1 if row_scale is None else M // row_scale.shape[0]
    extras = (bias, residual, layer_scale, row_scale)
    with torch.cuda.device_of(x):
        if implementation == "cublas":
            if activation == "none" and all(t is None for t in extras[1:]):
                return F.linear(x, weight, bias)
            z, config = F.linear(x, weight), EPILOGUE_META
            grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
            _linear_epilogue_kernel[grid](
                z, *extras, y, M, N, rows_per_sample, activation, **config
            )
        else:
            config = _device_meta(x, N)
            grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
            even = K % config["BLOCK_K"] == 0
            _linear_kernel[grid](
                x, weight, *extras, y, M, N, K, rows_per_sample, activation, even, **config
            )
    return y


@_fwd.register_fake
def _(x, weight, bias, residual, layer_scale, row_scale, activation, implementation):
    return _alloc(x, weight, residual)


def _save(ctx, inputs, output):
    x, weight, bias, residual, layer_scale, row_scale, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, bias, layer_scale, row_scale)
    ctx.res_dtype = None if residual is None else residual.dtype


def _backward(ctx, dy):
    x, weight, bias, layer_scale, row_scale = ctx.saved_tensors
    dz = dy.float()
    if row_scale is not None:
        rows_per_sample = x.shape[0] // max(row_scale.shape[0], 1)
        dz = dz * row_scale.float().repeat_interleave(rows_per_sample)[:, None]
    dlayer_scale = None
    gelu = ctx.activation == "gelu"
    z = F.linear(x, weight, bias).float() if gelu or layer_scale is not None else None
    if layer_scale is not None:
        a = F.gelu(z) if gelu else z
        dlayer_scale = (dz * a).sum(0).to(layer_scale.dtype)
        dz = dz * layer_scale.float()
    if gelu:
        dz = torch.ops.aten.gelu_backward(dz, z)
    dbias = None if bias is None else dz.sum(0).to(bias.dtype)
    dz = dz.to(x.dtype)
    dresidual = None if ctx.res_dtype is None else dy.to(ctx.res_dtype)
    return dz @ weight, dz.t() @ x, dbias, dresidual, dlayer_scale, None, None, None


_fwd.register_autograd(_backward, setup_context=_save)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`residual + row_scale * layer_scale * activation(x @ weight.T + bias)`, each part optional.

    x (..., K), weight (N, K), bias and layer_scale (N,), residual (..., N), row_scale (S,) where x
    has S samples along its first dimension. x, weight and bias share one of fp32, fp16, bf16;
    under autocast they are cast to its dtype and the residual stays as it is. Returns (..., N) in
    the promoted dtype of x and residual. `activation`: "none" | "gelu" (exact, erf).
    `implementation`: "auto" | "triton" | "cublas" | "torch". row_scale gets no gradient. Raises
    ValueError for shapes, devices and names, TypeError for dtypes that do not fit.
    """
    chosen = _runtime.resolve("linear", x, implementation, ("triton", "cublas", "torch"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r}, want one of {ACTIVATIONS}")
    if weight.dim() != 2 or x.dim() < 1:
        raise ValueError(
            f"linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "want (..., K) and (N, K)"
        )
    N, K = weight.shape
    lead = x.shape[:-1]
    _runtime.expect(
        "linear", x, x=(x, (*lead, K)), bias=(bias, (N,)), residual=(residual, (*lead, N)),
        layer_scale=(layer_scale, (N,)), row_scale=(row_scale, lead[:1]),
    )  # fmt: skip
    dtype = _runtime.autocast_dtype(x)
    if dtype is None:
        _runtime.expect("linear", x, x.dtype, weight=(weight, (N, K)), bias=(bias, (N,)))
    if chosen == "torch":
        return linear_reference(x, weight, bias, activation, residual, layer_scale, row_scale)
    x, weight, bias = _runtime.cast(dtype, x, weight, bias)
    x2 = x.reshape(-1, K).contiguous()
    res2 = None if residual is None else residual.reshape(-1, N)
    rest = (weight, bias, res2, layer_scale, row_scale)
    y = _fwd(x2, *(t if t is None else t.contiguous() for t in rest), activation, chosen)
    return y.view(*lead, N)
