"""Attention inside square windows of a feature map, with a learned bias for each offset (TinyViT).

    s[n, m] = scale * q[n] . k[m] + biases[|dy|, |dx|]      (dy, dx): from token n to token m
    p = softmax(s)      o = p v                             for each window and head

Backward, with delta = rowsum(do * o), which is rowsum(dp * p):
    dv = p^T do    dp = do v^T    ds = p * (dp - delta)
    dq = scale * ds k    dk = scale * ds^T q    dbiases[i, j] = sum of ds where |dy| = i, |dx| = j

B samples, a map of Y x X tokens in windows of W x W (L = W^2 tokens; Y and X multiples of W), H
heads of d = 32 features. qkv (B, Y, X, H, 3, d), q, k and v of a head side by side as TinyViT's
product writes them; biases (H, W^2), row major in (|dy|, |dx|); o (B, Y, X, H, d). Windows are cut
by addressing alone: no map is ever partitioned or merged in memory, and no table of L x L biases is
made: a score's bias is looked up by its offset.

Scores, softmax and sums are fp32; p is rounded to v's dtype for the second product, ds to q's.
Saved for backward: qkv, biases, o and the logarithms of the rows' sums, (B, Y, X, H) in fp32. p
comes again from them, block by block. The gradient of the biases has a pass of its own: a block of
ds summed over windows in registers, then over blocks and offsets; no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _chips, _dispatch, _policy

HEAD_DIM = 32
LOG2_E = 1.4426950408889634


def offsets(window: int, device=None) -> Tensor:
    """(L, L) int64: which of a head's biases each pair of tokens of a window takes."""
    at = torch.arange(window, device=device)
    apart = (at[:, None] - at).abs()
    index = apart[:, None, :, None] * window + apart[None, :, None, :]
    return index.reshape(window**2, window**2)


def _split(qkv, window):
    """q, k, v, each (B * windows, H, L, d)."""
    B, Y, X, H, _, d = qkv.shape
    cut = qkv.reshape(B, Y // window, window, X // window, window, H, 3, d)
    return cut.permute(6, 0, 1, 3, 5, 2, 4, 7).reshape(3, -1, H, window**2, d).unbind()


def _merge(o, shape, window):
    B, Y, X, H, _, d = shape
    cut = o.reshape(B, Y // window, X // window, H, window, window, d)
    return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, Y, X, H, d)


def window_attention_reference(qkv, biases, window, scale=None):
    q, k, v = _split(qkv, window)
    bias = biases[:, offsets(window, biases.device)].to(q.dtype)
    return _merge(_dispatch.sdpa(q, k, v, bias, scale), qkv.shape, window)


@triton.jit
def _start(program, Y, X, H, TILES: tl.constexpr, WINDOW: tl.constexpr):
    """(tile, head, first token of the window): int64, since maps may pass 2**31."""
    tile, head = program % TILES, program // TILES % H
    window = tl.cast(program // (TILES * H), tl.int64)
    across, down = X // WINDOW, Y // WINDOW
    row, column = window // across, window % across  # rows of windows, over the samples
    sample = row // down
    first = (sample * Y + row % down * WINDOW) * X + column * WINDOW
    return tile, head, first


@triton.jit
def _tokens(start, X, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Tokens start ... start + BLOCK - 1 of a window: y, x, place in the map, whether there is one.
    Those outside have the place of the last."""
    n = start + tl.arange(0, BLOCK)
    inside = n < WINDOW * WINDOW
    n = tl.minimum(n, WINDOW * WINDOW - 1)
    y, x = n // WINDOW, n % WINDOW
    return y, x, y * X + x, inside


@triton.jit
def _load(ptr, place, inside, row, HEAD_DIM: tl.constexpr):
    dims = tl.arange(0, HEAD_DIM)
    return tl.load(ptr + place[:, None] * row + dims[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _store(ptr, value, place, inside, row, HEAD_DIM: tl.constexpr):
    dims = tl.arange(0, HEAD_DIM)
    tl.store(ptr + place[:, None] * row + dims[None, :], value, mask=inside[:, None])


@triton.jit
def _scores(q, k, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale, WINDOW: tl.constexpr):
    """Scores in units of log2, queries x keys; keys outside get -inf."""
    s = tl.dot(q, k.T, input_precision="ieee") * scale
    offset = tl.abs(y_q[:, None] - y_k[None, :]) * WINDOW + tl.abs(x_q[:, None] - x_k[None, :])
    s += tl.load(bias_ptr + offset).to(tl.float32) * 1.4426950408889634  # log2(e)
    return tl.where(in_keys[None, :], s, float("-inf"))


@triton.jit
def _window_attention_kernel(
    qkv_ptr, bias_ptr,  # in: (B, Y, X, H, 3, d), (H, W * W)
    o_ptr, lse_ptr,  # out: (B, Y, X, H, d), (B, Y, X, H) or None
    Y, X, H, scale,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (L + BLOCK_M - 1) // BLOCK_M
    tile, head, first = _start(tl.program_id(0), Y, X, H, TILES, WINDOW)
    q_ptr = qkv_ptr + (first * H + head) * 3 * HEAD_DIM
    row = H * 3 * HEAD_DIM
    bias_ptr += head * L
    y_q, x_q, place, inside = _tokens(tile * BLOCK_M, X, BLOCK_M, WINDOW)
    q = _load(q_ptr, place, inside, row, HEAD_DIM)

    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, L, BLOCK_N):
        y_k, x_k, key, in_keys = _tokens(start, X, BLOCK_N, WINDOW)
        k = _load(q_ptr + HEAD_DIM, key, in_keys, row, HEAD_DIM)
        v = _load(q_ptr + 2 * HEAD_DIM, key, in_keys, row, HEAD_DIM)
        s = _scores(q, k, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale, WINDOW)
        new_peak = tl.maximum(peak, tl.max(s, axis=1))
        p = tl.exp2(s - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak = new_peak

    place = first + place
    _store(o_ptr + head * HEAD_DIM, acc / total[:, None], place, inside, H * HEAD_DIM, HEAD_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptr + place * H + head, peak + tl.log2(total), mask=inside)


@triton.jit
def _queries(
    q_ptr, o_ptr, do_ptr, lse_ptr, start, X, H,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """What backward wants of a block of queries. A row outside has zeros for q and do, and so adds
    nothing."""
    y, x, place, inside = _tokens(start, X, BLOCK, WINDOW)
    q = _load(q_ptr, place, inside, H * 3 * HEAD_DIM, HEAD_DIM)
    do = _load(do_ptr, place, inside, H * HEAD_DIM, HEAD_DIM)
    o = _load(o_ptr, place, inside, H * HEAD_DIM, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + place * H, mask=inside, other=float("inf"))
    return q, do, delta, lse, y, x, place, inside


@triton.jit
def _p_and_ds(
    q, k, v, do, delta, lse, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale, WINDOW: tl.constexpr
):
    """Softmax of a block and the gradient of its scores, both queries x keys in fp32."""
    s = _scores(q, k, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale, WINDOW)
    p = tl.exp2(s - lse[:, None])
    dp = tl.dot(do, v.T, input_precision="ieee")
    return p, p * (dp - delta[:, None])


@triton.jit
def _window_attention_backward_kernel(
    qkv_ptr, bias_ptr, o_ptr, do_ptr, lse_ptr,  # in: as forward; o and do (B, Y, X, H, d)
    dqkv_ptr,  # out: (B, Y, X, H, 3, d)
    Y, X, H, scale,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A program has a block of keys and makes dk and dv, or a block of queries and makes dq."""
    L: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (L + BLOCK - 1) // BLOCK
    tile, head, first = _start(tl.program_id(0), Y, X, H, 2 * TILES, WINDOW)
    row = H * 3 * HEAD_DIM
    q_ptr = qkv_ptr + (first * H + head) * 3 * HEAD_DIM
    dq_ptr = dqkv_ptr + (first * H + head) * 3 * HEAD_DIM
    o_ptr += (first * H + head) * HEAD_DIM
    do_ptr += (first * H + head) * HEAD_DIM
    lse_ptr += first * H + head
    bias_ptr += head * L
    scale2 = scale * 1.4426950408889634  # log2(e)
    if tile < TILES:
        y_k, x_k, key, in_keys = _tokens(tile * BLOCK, X, BLOCK, WINDOW)
        k = _load(q_ptr + HEAD_DIM, key, in_keys, row, HEAD_DIM)
        v = _load(q_ptr + 2 * HEAD_DIM, key, in_keys, row, HEAD_DIM)
        dk = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
        dv = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
        for start in range(0, L, BLOCK):
            q, do, delta, lse, y_q, x_q, _, _ = _queries(
                q_ptr, o_ptr, do_ptr, lse_ptr, start, X, H, BLOCK, WINDOW, HEAD_DIM
            )
            p, ds = _p_and_ds(
                q, k, v, do, delta, lse, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale2, WINDOW
            )
            dv = tl.dot(p.to(do.dtype).T, do, dv, input_precision="ieee")
            dk = tl.dot(ds.to(q.dtype).T, q, dk, input_precision="ieee")
        _store(dq_ptr + HEAD_DIM, dk * scale, key, in_keys, row, HEAD_DIM)
        _store(dq_ptr + 2 * HEAD_DIM, dv, key, in_keys, row, HEAD_DIM)
    else:
        q, do, delta, lse, y_q, x_q, query, in_queries = _queries(
            q_ptr, o_ptr, do_ptr, lse_ptr, (tile - TILES) * BLOCK, X, H, BLOCK, WINDOW, HEAD_DIM
        )
        dq = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
        for start in range(0, L, BLOCK):
            y_k, x_k, key, in_keys = _tokens(start, X, BLOCK, WINDOW)
            k = _load(q_ptr + HEAD_DIM, key, in_keys, row, HEAD_DIM)
            v = _load(q_ptr + 2 * HEAD_DIM, key, in_keys, row, HEAD_DIM)
            _, ds = _p_and_ds(
                q, k, v, do, delta, lse, bias_ptr, y_q, x_q, y_k, x_k, in_keys, scale2, WINDOW
            )
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        _store(dq_ptr, dq * scale, query, in_queries, row, HEAD_DIM)


@triton.jit
def _window_attention_scores_kernel(
    qkv_ptr, bias_ptr, o_ptr, do_ptr, lse_ptr,  # in: as backward
    ds_ptr,  # out: (CHUNKS, H, L, L) in fp32
    windows, chunks, Y, X, H, scale,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """A block of the scores' gradient, summed over every `chunks`-th window."""
    L: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (L + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    column, tile, head = pid % TILES, pid // TILES % TILES, pid // (TILES * TILES) % H
    chunk = pid // (TILES * TILES * H)
    row = H * 3 * HEAD_DIM
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    y_k, x_k, key, in_keys = _tokens(column * BLOCK, X, BLOCK, WINDOW)
    for window in range(chunk, windows, chunks):
        _, _, first = _start(window, Y, X, 1, 1, WINDOW)
        q_ptr = qkv_ptr + (first * H + head) * 3 * HEAD_DIM
        at = (first * H + head) * HEAD_DIM
        k = _load(q_ptr + HEAD_DIM, key, in_keys, row, HEAD_DIM)
        v = _load(q_ptr + 2 * HEAD_DIM, key, in_keys, row, HEAD_DIM)
        q, do, delta, lse, y_q, x_q, _, _ = _queries(
            q_ptr, o_ptr + at, do_ptr + at, lse_ptr + first * H + head, tile * BLOCK, X, H,
            BLOCK, WINDOW, HEAD_DIM,
        )  # fmt: skip
        _, ds = _p_and_ds(
            q, k, v, do, delta, lse, bias_ptr + head * L, y_q, x_q, y_k, x_k, in_keys,
            scale * 1.4426950408889634, WINDOW,
        )  # fmt: skip
        acc += ds
    rows, cols = tile * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    ds_ptr += (chunk * H + head).to(tl.int64) * L * L
    tl.store(
        ds_ptr + rows[:, None] * L + cols[None, :], acc,
        mask=(rows < L)[:, None] & (cols < L)[None, :],
    )  # fmt: skip


@triton.jit
def _window_attention_biases_kernel(
    ds_ptr,  # in: (H, L, L) in fp32
    dbias_ptr,  # out: (H, L) in fp32
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One offset of one head: the pairs that are (+-i, +-j) apart."""
    L: tl.constexpr = WINDOW * WINDOW
    offset = tl.program_id(0) % L
    i, j = offset // WINDOW, offset % WINDOW
    ds_ptr += (tl.program_id(0) // L).to(tl.int64) * L * L
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, L, BLOCK):
        y, x, token, inside = _tokens(start, WINDOW, BLOCK, WINDOW)
        for signs in tl.static_range(4):
            to_y = y - i if signs % 2 else y + i
            to_x = x - j if signs // 2 else x + j
            there = inside & (to_y >= 0) & (to_y < WINDOW) & (to_x >= 0) & (to_x < WINDOW)
            if signs % 2:  # +0 is -0
                there = there & (to_y < y)
            if signs // 2:
                there = there & (to_x < x)
            acc += tl.load(ds_ptr + token * L + to_y * WINDOW + to_x, mask=there, other=0.0)
    tl.store(dbias_ptr + tl.program_id(0), tl.sum(acc, axis=0))


def meta(dtype: torch.dtype) -> dict:
    """64 queries, and 32 keys at a time: with 64 the biases' addresses alone would spill."""
    m, n = (16, 16) if dtype == torch.float32 else (64, 32)  # FMA units: fewer registers
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 2}


def meta_backward(dtype: torch.dtype, capability: tuple[int, int], scores: bool = False) -> dict:
    """64 x 64 in 4 warps; in 8 for the gradient of the scores, which holds them twice. On sm_80
    nothing is loaded ahead: Triton 3.6 would spill."""
    block, warps = (16, 4) if dtype == torch.float32 else (64, 8 if scores else 4)
    stages = 1 if scores or not _chips.is_datacenter(capability) else 2
    return {"BLOCK": block, "num_warps": warps, "num_stages": stages}


BIASES_META = {"BLOCK": 64, "num_warps": 2}


def _windows(qkv, window):
    B, Y, X = qkv.shape[:3]
    return B * (Y // window) * (X // window)


def _alloc(qkv, keep):
    """What forward returns: o, and the logarithms of the rows' sums. Also its fake."""
    B, Y, X, H, _, d = qkv.shape
    lse = qkv.new_empty((B, Y, X, H) if keep else 0, dtype=torch.float32)
    return qkv.new_empty(B, Y, X, H, d), lse


@_dispatch.custom_op("deit_fast::window_attention")
def _fwd(
    qkv: Tensor, biases: Tensor, window: int, scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    o, lse = _alloc(qkv, keep)
    _, Y, X, H, _, d = qkv.shape
    config = meta(qkv.dtype)
    if o.numel():
        grid = (_windows(qkv, window) * H * _dispatch.cdiv(window**2, config["BLOCK_M"]),)
        with torch.cuda.device_of(qkv):
            _window_attention_kernel[grid](
                qkv, biases, o, lse if keep else None, Y, X, H, scale * LOG2_E,
                WINDOW=window, HEAD_DIM=d, **config,
            )  # fmt: skip
    return o, lse


@_fwd.register_fake
def _(qkv, biases, window, scale, keep):
    return _alloc(qkv, keep)


@_fwd.register_flops
def _(qkv, biases, window, *args, **kwargs):
    B, Y, X, H, _, d = qkv
    return 4 * B * Y * X * H * window**2 * d


@_dispatch.custom_op("deit_fast::window_attention_backward")
def _bwd(
    do: Tensor, qkv: Tensor, biases: Tensor, o: Tensor, lse: Tensor, window: int, scale: float,
    learns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dqkv, and, where the biases learn, their gradient (H, L) in fp32."""
    _, Y, X, H, _, d = qkv.shape
    L, windows = window**2, _windows(qkv, window)
    dqkv = torch.empty_like(qkv)
    dbiases = qkv.new_zeros((H, L) if learns else 0, dtype=torch.float32)
    if not qkv.numel():
        return dqkv, dbiases
    chip = _chips.chip(qkv.device)
    config, scores = (meta_backward(qkv.dtype, chip.capability, s) for s in (False, True))
    tiles = _dispatch.cdiv(L, config["BLOCK"])
    saved = (qkv, biases, o, do, lse)
    with torch.cuda.device_of(qkv):
        _window_attention_backward_kernel[(windows * H * 2 * tiles,)](
            *saved, dqkv, Y, X, H, scale, WINDOW=window, HEAD_DIM=d, **config
        )
        if learns:
            # a few programs a multiprocessor, each over many windows
            blocks = H * tiles * tiles
            chunks = min(windows, _dispatch.cdiv(4 * chip.num_sms, blocks))
            ds = qkv.new_empty(chunks, H, L, L, dtype=torch.float32)
            _window_attention_scores_kernel[(chunks * blocks,)](
                *saved, ds, windows, chunks, Y, X, H, scale, WINDOW=window, HEAD_DIM=d, **scores
            )
            _window_attention_biases_kernel[(H * L,)](
                ds.sum(0), dbiases, WINDOW=window, **BIASES_META
            )
    return dqkv, dbiases


@_bwd.register_fake
def _(do, qkv, biases, o, lse, window, scale, learns):
    shape = biases.shape if learns else 0
    return torch.empty_like(qkv), qkv.new_empty(shape, dtype=torch.float32)


@_bwd.register_flops
def _(do, qkv, biases, o, lse, window, *args, **kwargs):
    B, Y, X, H, _, d = qkv
    return 8 * B * Y * X * H * window**2 * d  # dv, dp, dq, dk


def _save(ctx, inputs, output):
    qkv, biases, ctx.window, ctx.scale, _ = inputs
    ctx.save_for_backward(qkv, biases, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the logarithms


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 5
    qkv, biases, o, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted

        def forward(qkv, biases):
            q, k, v = _split(qkv.float(), ctx.window)
            bias = biases.float()[:, offsets(ctx.window, biases.device)]
            p = (ctx.scale * q @ k.transpose(-2, -1) + bias).softmax(-1)
            return _merge(p @ v, qkv.shape, ctx.window).to(qkv.dtype)

        return *_dispatch.differentiable(forward, (qkv, biases), do), None, None, None
    learns = ctx.needs_input_grad[1]
    dqkv, dbiases = _bwd(do.contiguous(), qkv, biases, o, lse, ctx.window, ctx.scale, learns)
    return dqkv, dbiases.to(biases.dtype) if learns else None, None, None, None


_fwd.register_autograd(_backward, setup_context=_save)


def window_attention(
    qkv: Tensor,
    biases: Tensor,
    window: int,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Softmax attention of every head inside every window of a feature map.

    qkv (B, Y, X, H, 3, 32), one of fp32, fp16, bf16 (under autocast cast to its dtype); biases
    (H, window^2) in any of them, the bias of two tokens i rows and j columns apart at i * window
    + j; Y and X are multiples of `window` tokens. `scale` defaults to 1 / sqrt(32). Returns (B, Y,
    X, H, 32), contiguous. `implementation`: "auto" | "triton" | "torch". Source: TinyViT (Wu et
    al., 2022), section 3.3; the biases are LeViT's. Raises ValueError for shapes and devices,
    TypeError for dtypes that do not fit.
    """
    chosen = _policy.resolve("window_attention", qkv, implementation)
    (qkv,) = _checks.cast(_checks.autocast_dtype(qkv), qkv)
    if qkv.dim() != 6 or qkv.shape[4:] != (3, HEAD_DIM):
        raise ValueError(
            f"window_attention: qkv has shape {tuple(qkv.shape)}, expected (B, Y, X, H, 3, {HEAD_DIM})"
        )
    _, Y, X, H, _, d = qkv.shape
    if window < 1 or Y % window or X % window:
        raise ValueError(
            f"window_attention: window {window} on a map of {Y} x {X}, expected one that divides both"
        )
    _checks.expect("window_attention", qkv, biases=(biases, (H, window**2)))
    if biases.dtype not in _checks.DTYPES and chosen == "triton":
        raise TypeError(f"window_attention: biases have dtype {biases.dtype}, expected a float's")
    scale = d**-0.5 if scale is None else float(scale)
    if chosen == "torch":
        return window_attention_reference(qkv, biases, window, scale)
    if window * X * H * 3 * d >= 2**31:
        raise ValueError(f"window_attention: a window spans 2**31 elements of qkv ({X} x {H} wide)")
    keep = _dispatch.wants_grad(qkv, biases)
    return _fwd(qkv.contiguous(), biases.contiguous(), window, scale, keep)[0]
