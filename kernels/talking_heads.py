"""Talking-heads attention: the scores of all heads are mixed before the softmax and behind it.

    s_h = scale * q_h k_h^T            t_g = sum_h Wl[g, h] s_h + bl[g]       p_g = softmax(t_g)
    a_f = sum_g Ww[f, g] p_g + bw[f]   o_f = a_f v_f                          f, g, h: heads

bl is the same for all keys of a row, so that no softmax sees it and its gradient is 0. Backward:
    dv_f = a_f^T do_f          da_f = do_f v_f^T               dbw[f] = sum(da_f)
    dp_g = sum_f Ww[f, g] da_f                                 dWw[f, g] = sum(da_f * p_g)
    dt_g = p_g * (dp_g - delta_g)   delta_g = rowsum(p_g dp_g) dWl[g, h] = sum(dt_g * s_h)
    ds_h = sum_g Wl[g, h] dt_g   dq_h = scale * ds_h k_h       dk_h = scale * ds_h^T q_h
dbw needs no scores: it is the product of do's sum over queries and v's over keys.

A program holds a tile of all heads, (H, queries, keys), and goes over the keys twice: for the
largest score and the sum of each row, which mix all heads, then for the result. So nothing of size
N x N is ever written, and products of scores are made twice. Backward makes them again from the
logarithms of the sums: one launch goes over the keys for delta and dWw, then for dq and dWl; one
over the queries for dk and dv. dWl and dWw are partial sums of each program, no atomics.

Mixing is a product too, on tensor cores: of the weights and the tile as a matrix with a row a head.
They take 16 rows at least. With 8 heads, the halves of a head's tile are rows of their own, and the
weights become W (x) I, 16 x 16, with zeros where the halves would meet. A NaN, or in fp16 a score
that overflows, passes these zeros: one in q may reach other queries of its sample, which a NaN in k
or v does in any attention.

B samples, H heads (to 16), N tokens, d features a head (32, or 48 as in CaiT). qkv (B, N, 3, H, d),
contiguous, is the layout of the product before; o (B, N, H, d) that of the projection behind. Sums
and softmax are fp32. What is multiplied is rounded to qkv's dtype first, as PyTorch rounds it: s, p
and a, and in backward da, dt and ds. Saved: qkv, the weights and the logarithms (B, H, N) in fp32.

Source: Touvron et al. 2021, Going deeper with Image Transformers; Shazeer et al. 2020,
Talking-Heads Attention.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _chips, _dispatch, _policy

SPLITS = {32: 16, 48: 32}  # d: the first of the two powers of two that make it


def talking_heads_attention_reference(
    qkv, proj_l_weight, proj_l_bias, proj_w_weight, proj_w_bias, scale=None
):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = q * scale @ k.transpose(-2, -1)
    t = F.linear(s.permute(0, 2, 3, 1), proj_l_weight, proj_l_bias)
    p = t.permute(0, 3, 1, 2).softmax(-1)
    a = F.linear(p.permute(0, 2, 3, 1), proj_w_weight, proj_w_bias)
    return (a.permute(0, 3, 1, 2) @ v).transpose(1, 2)


@triton.jit
def _weights(ptr, dtype: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr):
    """W (x) I of at least 16 x 16, or its transpose: what `_mix` multiplies with."""
    SIZE: tl.constexpr = 16 if HEADS < 16 else HEADS
    REPEAT: tl.constexpr = SIZE // HEADS
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    g, h = rows // REPEAT, columns // REPEAT
    mask = (rows % REPEAT == columns % REPEAT) & (g < H) & (h < H)
    return tl.load(ptr + (h * H + g if T else g * H + h), mask=mask, other=0.0).to(dtype)


@triton.jit
def _bias(ptr, H: tl.constexpr, HEADS: tl.constexpr):
    bias = tl.zeros((HEADS,), tl.float32)
    if ptr is not None:
        heads = tl.arange(0, HEADS)
        bias = tl.load(ptr + heads, mask=heads < H, other=0.0).to(tl.float32)
    return bias[:, None, None]


@triton.jit
def _as_matrix(x, w):
    """The tile x (HEADS, n, m) as w's operand: a row is a head, or a part of it if they are few."""
    return tl.reshape(x, (w.shape[0], x.shape[0] * x.shape[1] * x.shape[2] // w.shape[0]))


@triton.jit
def _mix(w, x):
    """The heads of the tile x mixed by `_weights`."""
    mixed = tl.dot(w, _as_matrix(x, w).to(w.dtype), input_precision="ieee")
    return tl.reshape(mixed, x.shape)


@triton.jit
def _sum_pairs(x, y, sums):
    """sums + the sums of x_g * y_h over the tile for all pairs of heads, in the layout of
    `_weights`: (parts, SIZE, SIZE), each of a part of the tile, or every warp would hold it all."""
    PARTS: tl.constexpr = sums.shape[0]
    SIZE: tl.constexpr = sums.shape[1]
    shape: tl.constexpr = (SIZE, PARTS, x.shape[0] * x.shape[1] * x.shape[2] // (SIZE * PARTS))
    x = tl.permute(tl.reshape(x, shape), (1, 0, 2))
    y = tl.permute(tl.reshape(y, shape), (1, 2, 0))
    return tl.dot(x, y, sums, input_precision="ieee")


@triton.jit
def _place(first, N, row, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
           ROWS: tl.constexpr):  # fmt: skip
    """Offsets and mask of tokens first ... first + ROWS - 1 of all heads, (HEADS, ROWS, 1)."""
    head = tl.arange(0, HEADS)[:, None, None]
    token = first + tl.arange(0, ROWS)[None, :, None]
    return token * row + head * D, (head < H) & (token < N)


@triton.jit
def _load(ptr, first, N, row, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
          HEADS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Tokens of q, k, v or do: features 0 ... SPLIT - 1 and the others, both powers of two."""
    offsets, mask = _place(first, N, row, H, D, HEADS, ROWS)
    low, high = tl.arange(0, SPLIT)[None, None, :], tl.arange(0, D - SPLIT)[None, None, :]
    return (
        tl.load(ptr + offsets + low, mask=mask, other=0.0),
        tl.load(ptr + offsets + SPLIT + high, mask=mask, other=0.0),
    )


@triton.jit
def _store(ptr, x, factor, first, N, row, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
           HEADS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    offsets, mask = _place(first, N, row, H, D, HEADS, ROWS)
    low, high = tl.arange(0, SPLIT)[None, None, :], tl.arange(0, D - SPLIT)[None, None, :]
    tl.store(ptr + offsets + low, x[0] * factor, mask=mask)
    tl.store(ptr + offsets + SPLIT + high, x[1] * factor, mask=mask)


@triton.jit
def _zeros(D: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    low = tl.zeros((HEADS, ROWS, SPLIT), tl.float32)
    return low, tl.zeros((HEADS, ROWS, D - SPLIT), tl.float32)


@triton.jit
def _times_transposed(q, k):
    """q k^T of every head: (HEADS, rows of q, rows of k)."""
    s = tl.dot(q[0], tl.permute(k[0], (0, 2, 1)), input_precision="ieee")
    return tl.dot(q[1], tl.permute(k[1], (0, 2, 1)), s, input_precision="ieee")


@triton.jit
def _add_product(acc, a, v):
    """acc + a v of every head."""
    a = a.to(v[0].dtype)
    low = tl.dot(a, v[0], acc[0], input_precision="ieee")
    return low, tl.dot(a, v[1], acc[1], input_precision="ieee")


@triton.jit
def _per_row(first, N, H: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Offsets and mask of a sample's (H, N) figures."""
    head, token = tl.arange(0, HEADS)[:, None], first + tl.arange(0, ROWS)[None, :]
    return head * N + token, (head < H) & (token < N)


@triton.jit
def _logits(s, wl):
    return _mix(wl, s) * 1.4426950408889634  # log2(e)


@triton.jit
def _talking_heads_kernel(
    qkv_ptr, wl_ptr, ww_ptr, bw_ptr,  # in: (B, N, 3, H, d) (H, H) (H, H) (H,) or None
    o_ptr, lse_ptr,  # out: (B, N, H, d), (B, H, N) or None
    N, scale,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    ROW: tl.constexpr = 3 * H * D
    qkv_ptr += sample * N * ROW
    k_ptr, v_ptr = qkv_ptr + H * D, qkv_ptr + 2 * H * D
    keys = tl.arange(0, BLOCK_N)[None, None, :]
    q = _load(qkv_ptr, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_M)
    wl = _weights(wl_ptr, q[0].dtype, H, HEADS, False)

    peak = tl.full((HEADS, BLOCK_M), float("-inf"), tl.float32)
    total = tl.zeros((HEADS, BLOCK_M), tl.float32)
    for start in range(0, N, BLOCK_N):
        k = _load(k_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        t = tl.where(start + keys < N, _logits(_times_transposed(q, k) * scale, wl), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(t, axis=2))
        total = total * tl.exp2(peak - new_peak)
        total += tl.sum(tl.exp2(t - new_peak[:, :, None]), axis=2)
        peak = new_peak
    lse = peak + tl.log2(total)
    if lse_ptr is not None:
        offsets, mask = _per_row(first, N, H, HEADS, BLOCK_M)
        tl.store(lse_ptr + sample * H * N + offsets, lse, mask=mask)

    ww = _weights(ww_ptr, q[0].dtype, H, HEADS, False)
    bw = _bias(bw_ptr, H, HEADS)
    acc = _zeros(D, SPLIT, HEADS, BLOCK_M)
    for start in range(0, N, BLOCK_N):
        k = _load(k_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        v = _load(v_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        p = tl.exp2(_logits(_times_transposed(q, k) * scale, wl) - lse[:, :, None])
        p = tl.where(start + keys < N, p, 0.0)  # of zeros for a key it may be infinite
        a = _mix(ww, p) + bw
        acc = _add_product(acc, a, v)
    _store(o_ptr + sample * N * H * D, acc, 1.0, first, N, H * D, H, D, SPLIT, HEADS, BLOCK_M)


@triton.jit
def _talking_heads_dq_kernel(
    qkv_ptr, wl_ptr, ww_ptr,  # in: (B, N, 3, H, d) (H, H) (H, H)
    do_ptr, lse_ptr,  # in: (B, N, H, d), (B, H, N)
    delta_ptr, dqkv_ptr,  # out: (B, H, N), q's part of (B, N, 3, H, d)
    dwl_ptr, dww_ptr,  # out: (programs, SIZE, SIZE), in the layout of `_weights`
    N, scale,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // tiles, tl.program_id(0) % tiles * BLOCK_M
    ROW: tl.constexpr = 3 * H * D
    qkv_ptr += sample * N * ROW
    k_ptr, v_ptr = qkv_ptr + H * D, qkv_ptr + 2 * H * D
    keys = tl.arange(0, BLOCK_N)[None, None, :]
    q = _load(qkv_ptr, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_M)
    do = _load(do_ptr + sample * N * H * D, first, N, H * D, H, D, SPLIT, HEADS, BLOCK_M)
    offsets, mask = _per_row(first, N, H, HEADS, BLOCK_M)
    lse = tl.load(lse_ptr + sample * H * N + offsets, mask=mask, other=0.0)[:, :, None]
    wl = _weights(wl_ptr, q[0].dtype, H, HEADS, False)
    ww_t = _weights(ww_ptr, q[0].dtype, H, HEADS, True)

    SIZE: tl.constexpr = wl.shape[0]
    PARTS: tl.constexpr = min(HEADS, HEADS * BLOCK_M * BLOCK_N // (16 * SIZE))
    delta = tl.zeros((HEADS, BLOCK_M), tl.float32)
    total = tl.zeros((HEADS, BLOCK_M), tl.float32)  # 1 but for the rounding of lse
    dww = tl.zeros((PARTS, SIZE, SIZE), tl.float32)
    for start in range(0, N, BLOCK_N):
        k = _load(k_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        v = _load(v_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        p = tl.exp2(_logits(_times_transposed(q, k) * scale, wl) - lse)
        p = tl.where(start + keys < N, p, 0.0)
        da = _times_transposed(do, v)
        delta += tl.sum(p * _mix(ww_t, da), axis=2)
        total += tl.sum(p, axis=2)
        dww = _sum_pairs(da.to(q[0].dtype), p.to(q[0].dtype), dww)
    delta = delta / total  # so that dt sums to 0, as it must before it is multiplied by s
    tl.store(delta_ptr + sample * H * N + offsets, delta, mask=mask)

    wl_t = _weights(wl_ptr, q[0].dtype, H, HEADS, True)
    dq = _zeros(D, SPLIT, HEADS, BLOCK_M)
    dwl = tl.zeros((PARTS, SIZE, SIZE), tl.float32)
    for start in range(0, N, BLOCK_N):
        k = _load(k_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        v = _load(v_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
        s = _times_transposed(q, k) * scale
        p = tl.exp2(_logits(s, wl) - lse)
        p = tl.where(start + keys < N, p, 0.0)
        dt = p * (_mix(ww_t, _times_transposed(do, v)) - delta[:, :, None])
        dwl = _sum_pairs(dt.to(q[0].dtype), s.to(q[0].dtype), dwl)
        dq = _add_product(dq, _mix(wl_t, dt), k)
    dqkv_ptr += sample * N * ROW
    _store(dqkv_ptr, dq, scale, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_M)
    pairs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(dwl_ptr + program * SIZE * SIZE + pairs, tl.sum(dwl, axis=0))
    tl.store(dww_ptr + program * SIZE * SIZE + pairs, tl.sum(dww, axis=0))


@triton.jit
def _talking_heads_dkv_kernel(
    qkv_ptr, wl_ptr, ww_ptr, bw_ptr,  # in: (B, N, 3, H, d) (H, H) (H, H) (H,) or None
    do_ptr, lse_ptr, delta_ptr,  # in: (B, N, H, d), (B, H, N), (B, H, N)
    dqkv_ptr,  # out: k's and v's part of (B, N, 3, H, d)
    N, scale,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles are transposed: (heads, keys, queries). Queries outside have zeros for q and do, and so
    add nothing."""
    tiles = tl.cdiv(N, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_N
    ROW: tl.constexpr = 3 * H * D
    qkv_ptr += sample * N * ROW
    do_ptr += sample * N * H * D
    lse_ptr += sample * H * N
    delta_ptr += sample * H * N
    k = _load(qkv_ptr + H * D, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
    v = _load(qkv_ptr + 2 * H * D, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
    wl = _weights(wl_ptr, k[0].dtype, H, HEADS, False)
    ww = _weights(ww_ptr, k[0].dtype, H, HEADS, False)
    wl_t = _weights(wl_ptr, k[0].dtype, H, HEADS, True)
    ww_t = _weights(ww_ptr, k[0].dtype, H, HEADS, True)
    bw = _bias(bw_ptr, H, HEADS)
    inside = (first + tl.arange(0, BLOCK_N) < N)[None, :, None]
    dk = _zeros(D, SPLIT, HEADS, BLOCK_N)
    dv = _zeros(D, SPLIT, HEADS, BLOCK_N)
    for start in range(0, N, BLOCK_M):
        q = _load(qkv_ptr, start, N, ROW, H, D, SPLIT, HEADS, BLOCK_M)
        do = _load(do_ptr, start, N, H * D, H, D, SPLIT, HEADS, BLOCK_M)
        offsets, mask = _per_row(start, N, H, HEADS, BLOCK_M)
        lse = tl.load(lse_ptr + offsets, mask=mask, other=0.0)[:, None, :]
        delta = tl.load(delta_ptr + offsets, mask=mask, other=0.0)[:, None, :]
        p = tl.where(inside, tl.exp2(_logits(_times_transposed(k, q) * scale, wl) - lse), 0.0)
        a = _mix(ww, p) + bw
        dv = _add_product(dv, a, do)
        dt = p * (_mix(ww_t, _times_transposed(v, do)) - delta)
        dk = _add_product(dk, _mix(wl_t, dt), q)
    dqkv_ptr += sample * N * ROW + H * D
    _store(dqkv_ptr, dk, scale, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)
    _store(dqkv_ptr + H * D, dv, 1.0, first, N, ROW, H, D, SPLIT, HEADS, BLOCK_N)


def _config(m, n, warps, stages):
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


# Queries, keys, warps, stages by heads, the next power of two: forward, dq, dk and dv. A warp takes
# whole heads, so 4 warps serve 4 and fewer. Tiles are the largest that leave registers to spare.
CONFIGS = {
    4: (_config(32, 32, 4, 2), _config(32, 16, 4, 2), _config(32, 16, 4, 2)),
    8: (_config(32, 32, 8, 2), _config(16, 32, 8, 2), _config(32, 16, 8, 2)),
    16: (_config(16, 16, 8, 2), _config(16, 16, 8, 1), _config(16, 16, 8, 1)),
}
# FMA units: registers hold the operands too, and 16 heads fit in no way
FP32_CONFIGS = {
    4: (_config(16, 16, 8, 1),) * 3,
    8: (_config(16, 16, 8, 1), _config(8, 16, 8, 1), _config(16, 8, 8, 1)),
}


@cache
def configs(H: int, dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """Of the three kernels: by heads, because a program holds all of them."""
    of = FP32_CONFIGS if dtype == torch.float32 else CONFIGS
    return of[max(4, triton.next_power_of_2(H))]


@cache
def sizes(H: int, d: int) -> dict:
    """What is the same for the three kernels."""
    return {"H": H, "D": d, "HEADS": triton.next_power_of_2(H), "SPLIT": SPLITS[d]}


def _alloc(qkv, keep):
    """What forward returns: o, and the logarithms of the rows' sums. Also its fake."""
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H, d), qkv.new_empty((B, H, N) if keep else 0, dtype=torch.float32)


@_dispatch.custom_op("deit_fast::talking_heads")
def _fwd(
    qkv: Tensor, wl: Tensor, bl: Tensor | None, ww: Tensor, bw: Tensor | None, scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """bl is here for its gradient of zeros: DistributedDataParallel waits for every parameter's."""
    B, N, _, H, d = qkv.shape
    o, lse = _alloc(qkv, keep)
    config = configs(H, qkv.dtype)[0]
    if o.numel():
        with torch.cuda.device_of(qkv):
            _talking_heads_kernel[(B * _dispatch.cdiv(N, config["BLOCK_M"]),)](
                qkv, wl, ww, bw, o, lse if keep else None, N, scale, **sizes(H, d), **config
            )
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
    """Gradients of qkv, in its dtype, and of wl, bl (zeros), ww and bw, in fp32; of contiguous do
    and qkv."""
    B, N, _, H, d = qkv.shape
    dqkv, *sums = _alloc_backward(qkv)
    dwl, dbl, dww, dbw = sums
    if not qkv.numel():
        return dqkv, *(t.zero_() for t in sums)
    _, of_dq, of_dkv = configs(H, qkv.dtype)
    shared = sizes(H, d)
    HEADS, programs = shared["HEADS"], B * _dispatch.cdiv(N, of_dq["BLOCK_M"])
    SIZE = max(16, HEADS)
    delta = torch.empty_like(lse)
    pairs = qkv.new_empty(2, programs, SIZE, SIZE, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _talking_heads_dq_kernel[(programs,)](
            qkv, wl, ww, do, lse, delta, dqkv, *pairs, N, scale, **shared, **of_dq
        )
        _talking_heads_dkv_kernel[(B * _dispatch.cdiv(N, of_dkv["BLOCK_N"]),)](
            qkv, wl, ww, bw, do, lse, delta, dqkv, N, scale, **shared, **of_dkv
        )
    # Of W (x) I only the diagonals are sums of one part of the queries with itself.
    pairs = pairs.sum(1).view(2, HEADS, SIZE // HEADS, HEADS, SIZE // HEADS)
    pairs = pairs.diagonal(dim1=2, dim2=4).sum(-1)[:, :H, :H]
    dwl.copy_(pairs[0])
    dbl.zero_()
    dww.copy_(pairs[1])
    of_do, of_v = (t.sum(1, dtype=torch.float32) for t in (do, qkv[:, :, 2]))
    torch.sum(of_do * of_v, (0, 2), out=dbw)
    return dqkv, *sums


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
    ctx.set_materialize_grads(False)  # no zeros for the logarithms


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 7
    *tensors, lse = ctx.saved_tensors
    qkv, wl, bl, ww, bw = tensors
    if torch.is_grad_enabled():  # a second derivative is wanted

        def forward(qkv, *weights):
            weights = _checks.cast(qkv.dtype, *weights)
            return talking_heads_attention_reference(qkv, *weights, ctx.scale)

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
    """Attention whose heads are mixed before the softmax (proj_l) and behind it (proj_w).

    qkv (B, N, 3, H, d), the product's own layout; proj_l_weight, proj_w_weight (H, H), a row for
    each head of the result; proj_l_bias, proj_w_bias (H,). One of fp32, fp16, bf16 (under autocast
    qkv is cast to its dtype). `scale` of q k^T defaults to 1 / sqrt(d). Returns (B, N, H, d). The
    Triton kernel takes up to 16 heads, 8 in fp32, of d = 32 or 48; with gradients more than 8 where
    a program may have 109 KB of shared memory, elsewhere "auto" is PyTorch. `implementation`:
    "auto" | "triton" | "torch". Raises ValueError for shapes, devices, head counts and dimensions,
    TypeError for dtypes that do not fit.
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
    small = chosen == "triton" and trains and H > 8 and _lacks_memory(qkv.device)
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
    qkv, *weights = (t if t is None else t.contiguous() for t in (qkv, *weights))
    return _fwd(qkv, *weights, scale, trains)[0]


def _lacks_memory(device: torch.device) -> bool:
    """Whether the chip's limit is 99 KB: consumer and inference chips."""
    capability = _chips.capability(device.type, device.index)
    return capability in ((8, 6), (8, 9)) or capability is not None and capability >= (12, 0)


def why_not(H: int, d: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why the Triton kernels can't take H heads of d features; None: they can."""
    most = max(FP32_CONFIGS if dtype == torch.float32 else CONFIGS)
    if not 1 <= H <= most:
        return f"{H} heads in {dtype}, the kernel takes 1 to {most}"
    if d not in SPLITS:
        return f"head dimension {d}, the kernel takes {tuple(SPLITS)}"
    return None
