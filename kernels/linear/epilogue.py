"""Device functions of the epilogue: GELU, row statistics, and all that follows a matmul.

`quantized_linear`, `layer_norm_mlp` and `conv_norm` use them too.
"""

import triton
import triton.language as tl


@triton.jit
def _phi(z, EXACT: tl.constexpr):
    """Phi(z) = gelu(z) / z, the standard normal CDF.

    EXACT, for fp32: by erf. For half precision: 1 / (1 + 2^(z p(z^2))), with p fitted for this: z
    times the result is within 0.54 of half a bf16 ulp of erf's GELU, and within 3e-5. That is 13
    instructions instead of 32. Two of them run on the special-function unit, which is then the
    bottleneck. 1 / (1 + e) is the square of an rsqrt, which needs no care for denormals.
    """
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
def _row_mean_and_rstd(
    row_stats_ptr, first_row, rows_left, M, K, eps, PARTS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Mean and rstd of each row, from the row statistics of its PARTS equal parts.

    By the formula of Chan et al. for combining parts: no difference of large sums.
    """
    rows, parts = tl.arange(0, BLOCK_M), tl.arange(0, triton.next_power_of_2(PARTS))
    mask = (parts < PARTS)[:, None] & (rows < rows_left)[None, :]
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
    acc, first_row, rows_left, first_col, vectors, res_ptr, y_ptr, row_stats_out_ptr, training,
    M, N, rows_per_sample, ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store y for one tile, from acc = x @ W^T in fp32.

    `vectors`: pointers to bias, layer_scale, row_scale and the column sums of a folded LayerNorm,
    then the rows' mean and rstd. `training`: pointers to z, a and the column sums of y. Everything
    but acc and y may be None.

    With ACTIVATION "none" and "gelu", z, the value after the bias, is stored if z_ptr is given.
    With "gelu_backward", acc is da: z is read, a is recomputed from it, and y is dz. With
    "gelu_last", which conv_norm uses, GELU follows the residual.

    Offsets within the tile are 32-bit, which halves their registers; M * N may exceed 2**31.
    """
    b_ptr, ls_ptr, rs_ptr, sums_ptr, mean, rstd = vectors
    z_ptr, a_ptr, col_sums_ptr = training
    rows, cols = tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < rows_left, cols < N
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
