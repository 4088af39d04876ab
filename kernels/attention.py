"""softmax(scale * q k^T + bias) v, read where qkv wrote it, written where proj reads it.

    s = scale * q k^T + bias      p = softmax(s)      o = p v

Backward:
    dv = p^T do    dp = do v^T    ds = p * (dp - rowsum(dp * p))
    dq = scale * ds k    dk = scale * ds^T q    dbias = sum_batch(ds)

B samples, H heads, N queries, L keys, d features a head (32 or 64). q (B, N, H, d) and k, v
(B, L, H, d) may be views with any strides but a unit one in d: `qkv.view(B, N, 3, H, d).unbind(2)`
costs no copy. o is a new (B, N, H, d), which is the projection's (B, N, H * d). Scores, softmax and
sums are fp32; p is rounded to v's dtype for the second product. Saved for backward: the inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _runtime

HEAD_DIMS = (32, 64)
LOG2_E = 1.4426950408889634


def attention_reference(q, k, v, scale=None, bias=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


@triton.jit
def _attend(
    q, acc, peak, total, k_ptr, v_ptr, bias_ptrs, first, L, k_row, v_row, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys first ... first + BLOCK - 1."""
    keys = first + tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    inside = keys < L
    k_ptrs = k_ptr + keys[None, :] * k_row + dims[:, None]
    v_ptrs = v_ptr + keys[:, None] * v_row + dims[None, :]
    if MASKED:
        k = tl.load(k_ptrs, mask=inside[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=inside[:, None], other=0.0)
    else:
        k, v = tl.load(k_ptrs), tl.load(v_ptrs)

    s = tl.dot(q, k, input_precision="ieee") * scale
    if bias_ptrs is not None:
        bias = tl.load(bias_ptrs + keys[None, :], mask=inside[None, :], other=0.0)
        s += bias.to(tl.float32) * 1.4426950408889634  # log2(e)
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    # a row whose keys so far are all masked by the bias: -inf - -inf would be NaN
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # in: (B, N, H, d) (B, L, H, d) (B, L, H, d) (H, N, L) or None
    o_ptr,  # out: (B, N, H, d), contiguous
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides
    N, H, scale,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)  # one dimension: the others stop at 65535, and windows are many
    head = ((pid // tiles) % H).to(tl.int64)
    sample = (pid // (tiles * H)).to(tl.int64)  # int64, as head: strides may pass 2**31
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    in_rows = rows < N

    q_offs = sample * q_batch + head * q_head + rows[:, None] * q_row + dims[None, :]
    q = tl.load(q_ptr + q_offs, mask=in_rows[:, None], other=0.0)
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    if bias_ptr is not None:
        # rows outside read row 0: their result is not stored
        safe_rows = tl.where(in_rows, rows, 0).to(tl.int64)
        bias_ptrs = bias_ptr + (head * N + safe_rows)[:, None] * L
    else:
        bias_ptrs = None

    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Whole blocks without masks, then one tail just wide enough: 198 = 3 * 64 + 6 costs 208 keys.
    WHOLE: tl.constexpr = L // BLOCK_N * BLOCK_N
    for first in range(0, WHOLE, BLOCK_N):
        acc, peak, total = _attend(
            q, acc, peak, total, k_ptr, v_ptr, bias_ptrs, first, L, k_row, v_row, scale,
            BLOCK_N, HEAD_DIM, False,
        )  # fmt: skip
    if L > WHOLE:
        acc, peak, total = _attend(
            q, acc, peak, total, k_ptr, v_ptr, bias_ptrs, WHOLE, L, k_row, v_row, scale,
            BLOCK_TAIL, HEAD_DIM, True,
        )  # fmt: skip

    o_offs = ((sample * N + rows[:, None]) * H + head) * HEAD_DIM + dims[None, :]
    total = tl.where(total == 0.0, 1.0, total)  # every key masked: 0, as in PyTorch
    tl.store(o_ptr + o_offs, acc / total[:, None], mask=in_rows[:, None])


def meta(N: int, L: int, dtype: torch.dtype) -> dict:
    """Tiles by rule: 64 queries in 4 warps leave room for four CTAs a multiprocessor (sm_90); the
    prefix tokens alone take 16. Keys in blocks of 64: 198 and 578 then leave a tail of 16."""
    if dtype == torch.float32:  # FMA units: registers hold the operands too
        return {
            "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_TAIL": 16, "num_warps": 4, "num_stages": 2,
        }  # fmt: skip
    tail = max(triton.next_power_of_2(L % 64), 16)
    return {
        "BLOCK_M": 16 if N <= 16 else 64, "BLOCK_N": 64, "BLOCK_TAIL": tail,
        "num_warps": 4, "num_stages": 3 if L > 256 else 2,
    }  # fmt: skip


@torch.library.custom_op("deit_fast::attention", mutates_args=())
def _fwd(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    o = q.new_empty(q.shape)
    B, N, H, d = q.shape
    L = k.shape[1]
    if o.numel() == 0:
        return o
    if max(N * q.stride(1), L * k.stride(1), L * v.stride(1)) >= 2**31:
        raise ValueError(
            f"attention: one sample of q, k or v spans 2**31 elements ({N} queries, {L} keys)"
        )
    config = meta(N, L, q.dtype)
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    grid = (B * H * triton.cdiv(N, config["BLOCK_M"]),)
    with torch.cuda.device_of(q):
        _attention_kernel[grid](
            q, k, v, bias, o, *strides, N, H, scale * LOG2_E, L=L, HEAD_DIM=d, **config
        )
    return o


@_fwd.register_fake
def _(q, k, v, bias, scale):
    return q.new_empty(q.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do):
    q, k, v, bias = ctx.saved_tensors
    dtype = q.dtype
    q, k, v, do = (t.transpose(1, 2).float() for t in (q, k, v, do))
    s = ctx.scale * q @ k.transpose(-2, -1)
    s = s if bias is None else s + bias.float()
    p = s.softmax(-1).masked_fill(s.amax(-1, keepdim=True) == -torch.inf, 0.0)
    dp = do @ v.transpose(-2, -1)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    grads = ctx.scale * ds @ k, ctx.scale * ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ do
    dbias = None if bias is None else ds.sum(0).to(bias.dtype)
    return *(g.transpose(1, 2).to(dtype) for g in grads), dbias, None


_fwd.register_autograd(_backward, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`softmax(scale * q k^T + bias) v` for every sample and head.

    q (B, N, H, d); k, v (B, L, H, d), strided views welcome; one of fp32, fp16, bf16 (under
    autocast they are cast to its dtype). `scale` defaults to 1 / sqrt(d). `bias` (H, N, L) is
    added to the scaled scores, the same for every sample. Returns (B, N, H, d), contiguous. The
    Triton kernel takes d = 32 and 64. `implementation`: "auto" | "triton" | "torch". Raises
    ValueError for shapes, devices and head dimensions, TypeError for dtypes that do not fit.
    """
    chosen = _runtime.resolve("attention", q, implementation)
    q, k, v = _runtime.cast(_runtime.autocast_dtype(q), q, k, v)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"attention: q has shape {tuple(q.shape)} and k {tuple(k.shape)}, "
            "want (B, N, H, d) and (B, L, H, d)"
        )
    B, N, H, d = q.shape
    L = k.shape[1]
    _runtime.expect("attention", q, q.dtype, k=(k, (B, L, H, d)), v=(v, (B, L, H, d)))
    _runtime.expect("attention", q, bias=(bias, (H, N, L)))
    if L == 0:
        raise ValueError(f"attention: k has shape {tuple(k.shape)}, want at least one key")
    scale = d**-0.5 if scale is None else float(scale)
    if chosen == "torch":
        return attention_reference(q, k, v, scale, bias)
    if d not in HEAD_DIMS:
        raise ValueError(f"attention: head dimension {d}, the Triton kernel takes {HEAD_DIMS}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _fwd(q, k, v, None if bias is None else bias.contiguous(), scale)
