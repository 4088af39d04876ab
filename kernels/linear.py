"""Linear layer with everything that follows it inside a transformer block as its epilogue.

    z = x @ W^T + b
    a = z   or   gelu(z) = z * (1 + erf(z / sqrt(2))) / 2
    y = a * layer_scale * row_scale [+ residual]

Backward, with dz = dy * layer_scale * row_scale * gelu'(z), gelu'(z) = Phi(z) + z phi(z):
    dx = dz @ W      dW = dz^T @ x      db = sum_rows(dz)
    dresidual = dy   dlayer_scale = sum_rows(dy * row_scale * a)
One pass makes dz of dy and sums its columns on the way, a partial sum for every so many rows; the
two products are torch.mm's: nothing follows them.

M rows, K input features, N output features, S samples of M / S rows each. Shapes: x (M, K), W (N,
K), b and layer_scale (N,), row_scale (S,) (stochastic depth: 0 or 1 / keep probability), residual
and y (M, N). Products accumulate in fp32; the epilogue is fp32 and rounds once, to y's dtype: the
residual's where there is one (autocast keeps that stream in fp32), x's otherwise. fp32 products
are IEEE fp32, never TF32 (of backward's two, PyTorch's setting decides). GELU is erf in fp32 and
within 3e-5 of it in half precision. Saved for backward: x, W, b, layer_scale, row_scale and, with
GELU or a layer_scale, z in x's dtype.

In inference the epilogue may also leave the row statistics of y's rounded rows, (N / 64, 2, M) in fp32:
mean and sum of squared differences from it, of each 64 columns. layer_norm_linear, which shares the
kernel, makes its LayerNorm of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _checks, _chips, _dispatch, _policy, _tuned

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
def _tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row of a tile, rows left from there, and its first column. Neighbouring tiles share a
    row block, so x comes from device memory once; all of W fits in L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_row = tile // tiles_n * BLOCK_M
    return first_row, M - first_row, tile % tiles_n * BLOCK_N


@triton.jit
def _phi(z, EXACT: tl.constexpr):
    """The normal distribution's function, gelu(z) / z: by erf in fp32. For half precision
    1 / (1 + 2^(z p(z^2))) with a p fitted to this end: z times it is nowhere further from erf's
    than 0.54 of half a unit of bf16, 3e-5 at most. 13 instructions instead of 32, two of them on
    the unit for special functions, which is then the bound; 1 / (1 + e) is the square of an rsqrt,
    which takes no care of denormals."""
    if EXACT:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    s = tl.minimum(z * z, 30.25)
    p = (4.96967374e-8 * s - 3.23612039e-6) * s + 6.32384836e-5
    p = ((p * s + 6.43739593e-4) * s - 0.106197506) * s - 2.30119538
    r = tl.rsqrt(1.0 + tl.exp2(z * p))
    return r * r


@triton.jit
def _gelu(z, EXACT: tl.constexpr):
    return z * _phi(z, EXACT)


@triton.jit
def _gelu_and_slope(z, EXACT: tl.constexpr):
    phi = _phi(z, EXACT)
    density = 0.3989422804014327 * tl.exp2(z * z * -0.7213475204444817)
    return z * phi, phi + z * density


@triton.jit
def _row_row_stats(
    row_stats_ptr, first_row, left, M, K, eps, PARTS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """mean and rstd of each row from the row statistics of its PARTS equal parts (Chan et al.): no
    difference of large sums."""
    rows, parts = tl.arange(0, BLOCK_M), tl.arange(0, triton.next_power_of_2(PARTS))
    mask = (parts < PARTS)[:, None] & (rows < left)[None, :]
    # the parts are cast, not M: an M of 1 is a constant
    ptrs = row_stats_ptr + 2 * parts[:, None].to(tl.int64) * M + (first_row + rows)[None, :]
    means = tl.load(ptrs, mask=mask, other=0.0)
    squares = tl.load(ptrs + M, mask=mask, other=0.0)
    mean = tl.sum(means, axis=0) / PARTS
    diff = tl.where(mask, means - mean[None, :], 0.0)
    var = tl.sum(squares + diff * diff * (K / PARTS), axis=0) / K
    return mean, tl.rsqrt(var + eps)


@triton.jit
def _epilogue(
    acc, first_row, left, first_col, vectors, res_ptr, y_ptr, row_stats_out_ptr, hidden, M, N,
    rows_per_sample, ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store y for one tile: acc is x @ W^T in fp32. `vectors`: pointers to bias, layer_scale,
    row_scale and, of a folded LayerNorm, the column sums; the rows' mean and rstd. `hidden`:
    pointers to z, a and the sums of y's columns, which training wants: after a bias, "gelu" stores
    z; "gelu_backward", whose acc is da, reads z, makes a of it again, and dz is y. "gelu_last",
    of conv_norm, comes behind the residual. All but acc and y may be None. Offsets inside the tile
    are 32-bit, which halves the registers they take; M * N may pass 2**31."""
    b_ptr, ls_ptr, rs_ptr, sums_ptr, mean, rstd = vectors
    z_ptr, a_ptr, col_sums_ptr = hidden
    rows, cols = tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < left, cols < N
    mask = in_rows[:, None] & in_cols[None, :]
    base = first_row.to(tl.int64) * N
    offs = rows[:, None] * N + cols[None, :]
    if sums_ptr is not None:
        sums = tl.load(sums_ptr + cols, mask=in_cols, other=0.0)
        acc = (acc - mean[:, None] * sums[None, :]) * rstd[:, None]
    if b_ptr is not None:
        acc += tl.load(b_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_backward":
        z = tl.load(z_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
        a, slope = _gelu_and_slope(z, EXACT)
        acc *= slope
        if a_ptr is not None:
            tl.store(a_ptr + base + offs, a, mask=mask)
        if col_sums_ptr is not None:  # rows outside hold copies of the first one
            tile = (first_row // BLOCK_M).to(tl.int64)
            total = tl.sum(tl.where(in_rows[:, None], acc, 0.0), axis=0)
            tl.store(col_sums_ptr + tile * N + cols, total, mask=in_cols)
    elif z_ptr is not None:
        tl.store(z_ptr + base + offs, acc, mask=mask)
    if ACTIVATION == "gelu":
        acc = _gelu(acc, EXACT)
    if ls_ptr is not None:
        acc *= tl.load(ls_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if rs_ptr is not None:
        sample = (first_row + rows) // rows_per_sample
        acc *= tl.load(rs_ptr + sample, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if res_ptr is not None:
        acc += tl.load(res_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu_last":
        acc = _gelu(acc, EXACT)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + offs, y, mask=mask)
    if row_stats_out_ptr is not None:
        PART: tl.constexpr = 64  # ROW_STATS_WIDTH
        h = tl.reshape(y.to(tl.float32), (BLOCK_M, BLOCK_N // PART, PART))
        mean = tl.sum(h, axis=2) / PART
        h -= mean[:, :, None]
        parts = first_col // PART + tl.arange(0, BLOCK_N // PART)
        parts = parts.to(tl.int64)
        ptrs = row_stats_out_ptr + 2 * parts[None, :] * M + (first_row + rows)[:, None]
        inside = in_rows[:, None] & (parts * PART < N)[None, :]
        tl.store(ptrs, mean, mask=inside)
        tl.store(ptrs + M, tl.sum(h * h, axis=2), mask=inside)


@triton.jit
def _product(
    x_ptr, w_ptr, first_row, left, first_col, N, K, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ W^T of one tile in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:  # x_ptr and w_ptr are tensor descriptors, which give zeros outside
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_ptr.load([first_row, k]), w_ptr.load([first_col, k]).T, acc)
    else:
        rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        cols = first_col + tl.arange(0, BLOCK_N)
        # Rows and columns outside read the first ones and are not stored: no mask in the loop.
        safe_rows = tl.where(rows < left, rows, 0)
        safe_cols = tl.where(cols < N, cols, 0)
        x_ptrs = x_ptr + first_row.to(tl.int64) * K + (safe_rows[:, None] * K + ks[None, :])
        w_ptrs = w_ptr + (safe_cols[None, :] * K + ks[:, None])
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                x, w = tl.load(x_ptrs), tl.load(w_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(k + ks < K)[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=(k + ks < K)[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
    return acc


@triton.jit
def _linear_tile(
    tile, x_ptr, w_ptr, vectors, res_ptr, row_stats_ptr, y_ptr, row_stats_out_ptr, hidden, M, N, K,
    rows_per_sample, eps, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row, left, first_col = _tile(tile, M, N, BLOCK_M, BLOCK_N)
    b_ptr, ls_ptr, rs_ptr, sums_ptr = vectors
    mean, rstd = None, None
    if row_stats_ptr is not None:  # before the product: two numbers a row, and no loads behind it
        mean, rstd = _row_row_stats(row_stats_ptr, first_row, left, M, K, eps, PARTS, BLOCK_M)
        rstd *= tl.load(sums_ptr + N)  # the unit in which W' is written
    vectors = (b_ptr, ls_ptr, rs_ptr, sums_ptr, mean, rstd)
    acc = _product(
        x_ptr, w_ptr, first_row, left, first_col, N, K, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if SPLIT:  # half the columns at a time: the epilogue then fits in the registers of two CTAs
        HALF: tl.constexpr = BLOCK_N // 2
        left_acc, right_acc = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        _epilogue(
            left_acc, first_row, left, first_col, vectors, res_ptr, y_ptr, row_stats_out_ptr,
            hidden, M, N, rows_per_sample, ACTIVATION, EXACT, BLOCK_M, HALF,
        )  # fmt: skip
        _epilogue(
            right_acc, first_row, left, first_col + HALF, vectors, res_ptr, y_ptr,
            row_stats_out_ptr, hidden, M, N, rows_per_sample, ACTIVATION, EXACT, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        _epilogue(
            acc, first_row, left, first_col, vectors, res_ptr, y_ptr, row_stats_out_ptr, hidden,
            M, N, rows_per_sample, ACTIVATION, EXACT, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, b_ptr, res_ptr, ls_ptr, rs_ptr,  # in; the last four may be None
    row_stats_ptr, sums_ptr,  # in: (PARTS, 2, M) and (N + 1,), fp32, or None
    y_ptr, row_stats_out_ptr,  # out: (M, N) and (N / 64, 2, M) or None
    z_ptr,  # (M, N) or None; out, but in for "gelu_backward"
    a_ptr, col_sums_ptr,  # out: (M, N) and (cdiv(M, BLOCK_M), N) in fp32, or None
    M, N, K, rows_per_sample, eps,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    vectors = (b_ptr, ls_ptr, rs_ptr, sums_ptr)
    hidden = (z_ptr, a_ptr, col_sums_ptr)
    if PERSISTENT:  # one program a multiprocessor: loads for a tile run behind the last epilogue
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _linear_tile(
                tile, x_ptr, w_ptr, vectors, res_ptr, row_stats_ptr, y_ptr, row_stats_out_ptr, hidden,
                M, N, K, rows_per_sample, eps, ACTIVATION, EXACT, PARTS, EVEN_K, TMA, SPLIT,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _linear_tile(
            tl.program_id(0), x_ptr, w_ptr, vectors, res_ptr, row_stats_ptr, y_ptr, row_stats_out_ptr,
            hidden, M, N, K, rows_per_sample, eps, ACTIVATION, EXACT, PARTS, EVEN_K, TMA, SPLIT,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _linear_epilogue_kernel(
    product_ptr, b_ptr, res_ptr, ls_ptr, rs_ptr,  # in; the last four may be None
    y_ptr, row_stats_out_ptr, z_ptr,  # out: (M, N), (N / 64, 2, M), (M, N); the last two or None
    M, N, rows_per_sample,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same epilogue as a pass of its own, behind a product from cuBLAS."""
    first_row, left, first_col = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows, cols = tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    mask = (rows < left)[:, None] & (cols < N)[None, :]
    offs = rows[:, None] * N + cols[None, :]
    product_ptr += first_row.to(tl.int64) * N
    acc = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    vectors = (b_ptr, ls_ptr, rs_ptr, None, None, None)
    _epilogue(
        acc, first_row, left, first_col, vectors, res_ptr, y_ptr, row_stats_out_ptr,
        (z_ptr, None, None), M, N, rows_per_sample, ACTIVATION, EXACT, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _linear_backward_kernel(
    dy_ptr, z_ptr, ls_ptr, rs_ptr,  # in: (M, N) (M, N) (N,) (S,), the last three may be None
    dz_ptr, a_ptr,  # out: (M, N), or None
    db_ptr, dls_ptr,  # out: (cdiv(M, ROWS), N) in fp32, or None
    M, N, rows_per_sample, ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz of dy, and its column sums over ROWS rows at a time."""
    first_row, left, first_col = _tile(tl.program_id(0), M, N, ROWS, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    base = first_row.to(tl.int64) * N
    if ls_ptr is not None:
        ls = tl.load(ls_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dls = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < left)[:, None] & in_cols[None, :]
        offs = rows[:, None] * N + cols[None, :]
        dz = tl.load(dy_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
        if rs_ptr is not None:
            sample = (first_row + rows) // rows_per_sample
            dz *= tl.load(rs_ptr + sample, mask=rows < left, other=0.0).to(tl.float32)[:, None]
        if z_ptr is not None:
            a = tl.load(z_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION == "gelu":
                a, slope = _gelu_and_slope(a, EXACT)
            if a_ptr is not None:
                tl.store(a_ptr + base + offs, a, mask=mask)
            if dls_ptr is not None:
                dls += dz * a
        if ls_ptr is not None:
            dz *= ls
        if ACTIVATION == "gelu":
            dz *= slope
        if dz_ptr is not None:
            tl.store(dz_ptr + base + offs, dz, mask=mask)
        db += dz
    sums = (first_row // ROWS).to(tl.int64) * N + cols
    if db_ptr is not None:
        tl.store(db_ptr + sums, tl.sum(db, axis=0), mask=in_cols)
    if dls_ptr is not None:
        tl.store(dls_ptr + sums, tl.sum(dls, axis=0), mask=in_cols)


# 8 elements a thread and step; 128 rows a program leave partial sums of a 64th of dy's bytes (bf16)
BACKWARD_META = {"ROWS": 128, "BLOCK_M": 8, "BLOCK_N": 128, "num_warps": 4}
EPILOGUE_META = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}  # 8 elements (16 bytes) a thread
ROW_STATS_WIDTH = 64  # columns of y that one pair of row statistics summarises


def _config(m, n, k, warps, stages, tma=False, persistent=False, split=False):
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TMA": tma, "PERSISTENT": persistent,
        "SPLIT": split, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


FP32_CONFIG = _config(64, 64, 16, 8, 2)  # FMA units: registers hold the operands too
BACKWARD_CONFIG = _config(64, 128, 64, 4, 3, tma=True, split=True)  # backward_config says where
WIDE_BACKWARD_CONFIG = _config(128, 256, 64, 8, 4, tma=True, split=True)  # one CTA, to be raced
# What each chip may be served with; the order is the rule's. Nothing here spills or serialises its
# products with any epilogue: tests/benchmarks/test_ahead_of_time.py. Left out, with the compiler's figures in
# docs/performance.md: 128 x 256 in one piece (Triton 3.6's ptxas serialises the products) and warp
# specialisation (Triton 3.9 refuses host descriptors).
HOPPER_CONFIGS = [
    # Two CTAs a multiprocessor: one runs its epilogue behind the other's product.
    _config(128, 128, 64, 8, 3, tma=True, split=True),
    # N = 192 and its like, where 128 columns would idle a quarter of the last tile. Three CTAs.
    _config(128, 64, 64, 4, 3, tma=True),
    _config(64, 32, 64, 4, 4),  # few rows
    _config(128, 256, 64, 8, 3, tma=True, split=True),
    _config(128, 128, 64, 8, 3, tma=True, persistent=True, split=True),
    _config(128, 256, 64, 8, 3, tma=True, persistent=True, split=True),
    BACKWARD_CONFIG,
    _config(128, 128, 64, 8, 3, split=True),
    _config(128, 64, 64, 4, 3),
]
AMPERE_CONFIGS = [
    _config(64, 128, 64, 4, 3, split=True),
    _config(128, 64, 64, 4, 3),
    _config(64, 32, 64, 4, 4),
    _config(128, 128, 32, 8, 4, split=True),
]


def backward_config(config: dict) -> dict:
    """A configuration as "gelu_backward" takes it. Its epilogue holds twice as much: always half
    the columns at a time. On sm_90 8 warps would spill, held to the registers of two CTAs, but for
    pointers: half the rows in 4 warps then, three CTAs."""
    if config["TMA"] and config["num_warps"] == 8:
        return BACKWARD_CONFIG
    config = config | {"SPLIT": config["BLOCK_N"] >= 64}
    if config["BLOCK_N"] == 128 and config["BLOCK_K"] == 64 and config["num_warps"] == 8:
        config["maxnreg"] = 128
    return config


def configs(
    dtype: torch.dtype, capability: tuple[int, int], backward: bool = False
) -> list[dict]:  # fmt: skip
    """Every configuration of the Triton kernel that a tuned table may name; backward: of
    "gelu_backward"."""
    if dtype == torch.float32:
        return [FP32_CONFIG]
    hopper = _chips.is_datacenter(capability)
    found = HOPPER_CONFIGS if hopper else AMPERE_CONFIGS
    if not backward:
        return found
    wide = [WIDE_BACKWARD_CONFIG] if hopper else []
    found = [backward_config(config) for config in found] + wide
    return [config for i, config in enumerate(found) if config not in found[:i]]


@_tuned.validates("linear")
def _why_not(shape, choice, capability):
    dtype = getattr(torch, str(shape.get("dtype")), None)
    if dtype not in _checks.DTYPES:
        return f"dtype {shape.get('dtype')!r}"
    epilogue = str(shape.get("epilogue"))
    if choice.get("implementation") == "cublas" and "folded" in epilogue:
        return "cuBLAS rounds the product before LayerNorm's mean is taken from it"
    if "row_stats" in epilogue and choice.get("BLOCK_N", 64) < ROW_STATS_WIDTH:
        return f"a tile narrower than the {ROW_STATS_WIDTH} columns of row statistics"
    offered = configs(dtype, capability, epilogue == "gelu_backward")
    return _tuned.check_choice(choice, ("triton", "cublas"), offered)


def meta(
    M: int, N: int, dtype: torch.dtype, capability: tuple[int, int], num_sms: int,
    row_stats: bool = False,
) -> dict:  # fmt: skip
    """The configuration for a shape that no table lists: the first of the chip's three that leaves
    no tile half empty and every multiprocessor with one."""
    if dtype == torch.float32:
        return FP32_CONFIG
    wide, narrow, small = configs(dtype, capability)[:3]
    for config in (wide, narrow) if N % wide["BLOCK_N"] == 0 else (narrow,):
        if _dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"]) >= num_sms:
            return config
    return narrow if row_stats else small  # row statistics take 64 columns at a time


def epilogue_name(activation, bias, residual, scaled, normalised, row_stats) -> str:
    """What follows the product, as tuned tables write it: "folded+bias+gelu"."""
    parts = {
        "folded": normalised, "bias": bias, activation: activation != "none",
        "scales": scaled, "residual": residual, "row_stats": row_stats,
    }  # fmt: skip
    return "+".join(name for name, present in parts.items() if present)


def _choose(x, N, epilogue, row_stats, implementation):
    """("cublas" or "triton", configuration): a tuned table's word, or the rule's."""
    (M, K), dtype = x.shape, x.dtype
    chip = _chips.chip(x.device)
    shape = {"M": M, "K": K, "N": N, "dtype": str(dtype)[6:], "epilogue": epilogue}
    found = _tuned.lookup("linear", shape, chip)
    if found is not None and implementation in ("auto", found["implementation"]):
        config = {k: v for k, v in found.items() if k != "implementation"}
        return found["implementation"], config
    if implementation == "auto":
        implementation = _policy.choose("linear", chip.capability, dtype).implementation
    config = meta(M, N, dtype, chip.capability, chip.num_sms, row_stats)
    return implementation, backward_config(config) if epilogue == "gelu_backward" else config


def _alloc(x, weight, residual, emit, keep):
    """What forward returns: y, row statistics, z. Also its fake, so the two cannot disagree."""
    (M, _), N = x.shape, weight.shape[0]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    row_stats = (N // ROW_STATS_WIDTH, 2, M) if emit else 0
    z = x.new_empty((M, N) if keep else 0)
    return x.new_empty(M, N, dtype=dtype), x.new_empty(row_stats, dtype=torch.float32), z


def run(
    y, x, weight, bias=None, residual=None, layer_scale=None, row_scale=None, row_stats=None,
    column_sums=None, row_stats_out=None, z=None, a_out=None, activation="none", eps=0.0,
    implementation="triton",
):  # fmt: skip
    """Launch what computes y (M, N) of contiguous operands, by table or rule. z gets x @ W^T + b.
    Of "gelu_backward", which reads z and writes a_out and y, the result is the sum of y's rows."""
    (M, K), N = x.shape, weight.shape[0]
    if N * K >= 2**31:
        raise ValueError(f"linear: weight has {N} x {K} elements, expected fewer than 2**31")
    rows_per_sample = 1 if row_scale is None else M // row_scale.shape[0]
    extras = (bias, residual, layer_scale, row_scale)
    scaled = layer_scale is not None or row_scale is not None
    emit, exact = row_stats_out is not None, x.dtype == torch.float32
    epilogue = epilogue_name(
        activation, bias is not None, residual is not None, scaled, row_stats is not None, emit
    )
    chosen, config = _choose(x, N, epilogue, emit, implementation)
    backward = activation == "gelu_backward"
    with torch.cuda.device_of(x):
        if chosen == "cublas" and epilogue in ("", "bias") and z is None:
            args = (x, weight.t()) if bias is None else (bias.to(x.dtype), x, weight.t())
            (torch.mm if bias is None else torch.addmm)(*args, out=y)
            return
        if chosen == "cublas":
            product, config = F.linear(x, weight), EPILOGUE_META
            if backward:
                return _linear_backward(product, z, None, None, "gelu", y, a_out, True)[0]
            grid = (_dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"]),)
            _linear_epilogue_kernel[grid](
                product, *extras, y, row_stats_out, z, M, N, rows_per_sample, activation, exact,
                **config,
            )  # fmt: skip
            return
        if K * x.element_size() % 16 or not _aligned(x, weight):
            config = _without_tma(config, HOPPER_CONFIGS)
            config = backward_config(config) if backward else config
        x_arg, w_arg = x, weight
        if config["TMA"]:
            x_arg = TensorDescriptor.from_tensor(x, [config["BLOCK_M"], config["BLOCK_K"]])
            w_arg = TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
        tiles_m = _dispatch.cdiv(M, config["BLOCK_M"])
        col_sums = x.new_empty(tiles_m, N, dtype=torch.float32) if backward else None
        tiles = tiles_m * _dispatch.cdiv(N, config["BLOCK_N"])
        if config["PERSISTENT"]:
            tiles = min(tiles, _chips.chip(x.device).num_sms)
        _linear_kernel[(tiles,)](
            x_arg, w_arg, *extras, row_stats, column_sums, y, row_stats_out, z, a_out, col_sums,
            M, N, K, rows_per_sample, eps, ACTIVATION=activation, EXACT=exact,
            PARTS=1 if row_stats is None else row_stats.shape[0],
            EVEN_K=K % config["BLOCK_K"] == 0, **config,
        )  # fmt: skip
    return col_sums.sum(0) if backward else None


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


def _without_tma(config, listed):
    """What the hardware's copies can't address, pointers can: the listed tile of the same width."""
    if not config["TMA"]:
        return config
    width = min(config["BLOCK_N"], 128)
    return next(c for c in listed if not c["TMA"] and c["BLOCK_N"] == width)


def _aligned(*tensors):
    return all(t.data_ptr() % 16 == 0 for t in tensors)


@_fwd.register_fake
def _(x, weight, bias, residual, layer_scale, row_scale, activation, emit, keep, implementation):
    return _alloc(x, weight, residual, emit, keep)


@_fwd.register_flops
def _(x, weight, *args, **kwargs):
    (M, K), N = x, weight[0]
    return 2 * M * N * K


def _alloc_backward(dy, z, layer_scale, row_scale, activation, dtype, has_bias):
    """What linear_backward returns; also its fake."""
    M, N = dy.shape
    changed = dy.dtype != dtype or activation != "none" or layer_scale is not None
    changed = changed or row_scale is not None
    return (
        dy.new_empty((M, N) if changed else 0, dtype=dtype),
        dy.new_empty(N if has_bias else 0, dtype=torch.float32),
        dy.new_empty(0 if layer_scale is None else N, dtype=torch.float32),
    )


@_dispatch.custom_op("deit_fast::linear_backward")
def linear_backward(
    dy: Tensor,
    z: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz (M, N) in `dtype`, empty where it is dy itself; the sums of its columns (N,) in fp32, if
    there is a bias; dlayer_scale (N,) in fp32. All contiguous."""
    made = _alloc_backward(dy, z, layer_scale, row_scale, activation, dtype, has_bias)
    dz, db, dls = made
    if not dy.numel():
        return dz, db.zero_(), dls.zero_()
    if not any(t.numel() for t in made):
        return made
    dz_out = dz if dz.numel() else None
    sums = _linear_backward(dy, z, layer_scale, row_scale, activation, dz_out, None, has_bias)
    return dz, *(empty if t is None else t for empty, t in zip((db, dls), sums, strict=True))


def _linear_backward(dy, z, layer_scale, row_scale, activation, dz, a, has_bias):
    """The launch: db and dlayer_scale, (N,) in fp32, or None."""
    M, N = dy.shape
    parts = _dispatch.cdiv(M, BACKWARD_META["ROWS"])
    db, dls = (
        dy.new_empty(parts, N, dtype=torch.float32) if wanted else None
        for wanted in (has_bias, layer_scale is not None)
    )
    grid = (parts * _dispatch.cdiv(N, BACKWARD_META["BLOCK_N"]),)
    per_sample = 1 if row_scale is None else M // row_scale.shape[0]
    exact = (dy if dz is None else dz).dtype == torch.float32
    with torch.cuda.device_of(dy):
        _linear_backward_kernel[grid](
            dy, z, layer_scale, row_scale, dz, a, db, dls, M, N, per_sample, activation, exact,
            **BACKWARD_META,
        )  # fmt: skip
    return [t if t is None else t.sum(0) for t in (db, dls)]


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
    dz, db, dls = linear_backward(
        dy, z, layer_scale, row_scale, ctx.activation, x.dtype, bias is not None
    )
    dz = dz if dz.numel() else dy
    dx, dw = None, None
    if ctx.needs_input_grad[0]:
        dx = dz @ weight
    if ctx.needs_input_grad[1]:
        dw = dz.t() @ x
    db = None if bias is None else db.to(bias.dtype)
    dls = None if layer_scale is None else dls.to(layer_scale.dtype)
    return dx, dw, db, dresidual, dls, *(None,) * 5


_fwd.register_autograd(_backward, setup_context=_save)


@_dispatch.custom_op("deit_fast::linear_gelu_backward")
def linear_gelu_backward(
    dy: Tensor, weight: Tensor, z: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Through y = gelu(z) @ W^T: dz = dy @ W * gelu'(z) and a = gelu(z), made again, in one pass
    behind the product; and the sums of dz's columns in fp32.

    dy (M, N), weight (N, K), z (M, K), one dtype, contiguous. Returns dz and a (M, K), (K,)."""
    dz, a = torch.empty_like(z), torch.empty_like(z)
    if not z.numel():
        return dz, a, z.new_zeros(z.shape[1], dtype=torch.float32)
    # the kernel reads both operands along the sum: a copy of the weight is small beside dy
    transposed = weight.t().contiguous()
    sums = run(
        dz, dy, transposed, z=z, a_out=a, activation="gelu_backward", implementation=implementation
    )
    return dz, a, sums


@linear_gelu_backward.register_fake
def _(dy, weight, z, implementation):
    return torch.empty_like(z), torch.empty_like(z), z.new_empty(z.shape[1], dtype=torch.float32)


@linear_gelu_backward.register_flops
def _(dy, weight, *args, **kwargs):
    M, (N, K) = dy[0], weight
    return 2 * M * N * K


def worth_row_stats(x, N, tensors) -> bool:
    """Whether the next product, three or four times as wide in a transformer, can fold its
    LayerNorm with profit, without gradients: see layer_norm_linear."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    half = half and all(t is None or t.dtype == x.dtype for t in tensors)
    return half and N % ROW_STATS_WIDTH == 0 and _dispatch.at_least(x.shape[0], 8 * N)


def _torch(x, weight, bias, activation, residual, layer_scale, row_scale):
    """The reference; where nothing watches, with what follows the product in its place: a new
    tensor a step costs a CPU more than the arithmetic."""
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

    x (..., K), weight (N, K), bias and layer_scale (N,), residual (..., N), row_scale (S,) where x
    has S samples along its first dimension. x, weight and bias share one of fp32, fp16, bf16; under
    autocast x and weight are cast to its dtype, the others stay as they are. Returns (..., N) in
    the promoted dtype of x and residual. `activation`: "none" | "gelu" (erf; in half precision
    within 3e-5 of it). `implementation`: "auto" | "triton" | "cublas" | "torch". row_scale gets
    no gradient. With `return_row_stats` also what `layer_norm_linear` wants to know of the result's
    rows, (N / 64, 2, rows) in fp32: mean and sum of squared differences from it, of each 64
    columns; None where it would have no use for them or "torch" runs. Raises ValueError for
    shapes, devices and names, TypeError for dtypes that do not fit.
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
    # what GELU's and the LayerScale's gradients are made of
    keep = trains and (activation == "gelu" or layer_scale is not None)
    rest = (t if t is None else t.contiguous() for t in rest)
    y, row_stats, _ = _fwd(x2, *rest, activation, emit, keep, implementation)
    y = y.view(*lead, N)
    return (y, row_stats if emit else None) if return_row_stats else y
