"""Cross entropy with a target of which K probabilities are known (TinyViT paper, section 3.1).

    q_c = probs_k    for c = indices_k, k < K        what a soft-label store has of a teacher
    q_c = r          for every other class           r = max(1 - s, 0) / (C - K), s = sum_k probs_k
    loss = -sum_c q_c log p_c      p = softmax(z)    of each row, then the mean over rows
         = -sum_k (probs_k - r) log p_(indices_k) - r sum_c log p_c

z: logits, B rows, C classes. The dense target is never written: a row costs its logits and K pairs.
Stored probabilities, rounded to fp16, may sum to a little more than 1; r is 0 then, not negative.
Backward, per row, times dL / B:
    dz_c = Q p_c - q_c,   Q = s + (C - K) r = max(s, 1) where K < C, and s where K = C

Arithmetic is fp32 whatever the dtypes. 0 log 0 is 0: a class of logit -inf costs nothing where its
target is 0. An index outside 0..C-1 makes the row NaN, loss and gradient, and so does a NaN among
its logits or probabilities. The indices of a row must differ; this is not checked. No rows: NaN, as
in PyTorch. Saved tensor: dz in fp32, as in `distillation_loss` and for the same reason.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _dispatch, _plans, _policy
from .distillation_loss import _add_block, _q_log_p, _rows, _sum_q_log_p

INDEX_DTYPES = (torch.int64, torch.int32)


def dense_target(indices: Tensor, probs: Tensor, classes: int) -> Tensor:
    """The dense target that the K pairs of a row stand for.

    Args:
        indices: int64 or int32 (B, K), each once in a row.
        probs: Floating point (B, K).
        classes: C.

    Returns:
        (B, classes) in the dtype of `probs`.
    """
    others = classes - indices.shape[1]
    rest = (1 - probs.sum(1, keepdim=True)).clamp(min=0) / max(others, 1)
    return rest.expand(-1, classes).scatter(1, indices.long(), probs)


def sparse_cross_entropy_reference(logits: Tensor, indices: Tensor, probs: Tensor) -> Tensor:
    """`sparse_cross_entropy` in PyTorch's operations: the definition of right."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    target = dense_target(indices, probs.detach().to(z.dtype), z.shape[1])
    return -_sum_q_log_p(target, F.log_softmax(z, 1)).mean()


@triton.jit
def _sparse_cross_entropy_kernel(
    z_ptr, i_ptr, q_ptr,  # in:  (B, C), (B, K), (B, K)
    loss_ptr, dz_ptr,  # out: (B,), (B, C) or None
    inv_B,
    C: tl.constexpr, K: tl.constexpr, Z_ROW: tl.constexpr, I_ROW: tl.constexpr,
    Q_ROW: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: B * C may exceed 2**31
    cols = tl.arange(0, BLOCK)
    pairs = tl.arange(0, BLOCK_K)
    zero = tl.full((), 0.0, tl.float32)

    known = zero
    outside = tl.full((), 0, tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + pairs
        known += tl.sum(tl.load(q_ptr + row * Q_ROW + k, mask=k < K, other=0.0).to(tl.float32))
        i = tl.load(i_ptr + row * I_ROW + k, mask=k < K, other=0)
        outside += tl.sum(((i < 0) | (i >= C)).to(tl.int32))
    if K < C:
        rest = tl.where(known > 1.0, 0.0, 1.0 - known) / (C - K)  # NaN stays
    else:
        rest = zero
    total = known + rest * (C - K)

    # A row that fits in one block stays in registers: both loops are unrolled then, and their loads
    # are merged. A wider row comes from the cache the second time.
    z_max, z_sum = tl.full((), float("-inf"), tl.float32), zero
    for start in range(0, C, BLOCK):
        c = start + cols
        z = tl.load(z_ptr + row * Z_ROW + c, mask=c < C, other=float("-inf")).to(tl.float32)
        z_max, z_sum = _add_block(z, z_max, z_sum)
    # log p = x - max - log(sum), in this order: max + log(sum), the LSE, would round away the loss
    # of a confident row
    z_log = tl.where(outside > 0, float("nan"), tl.log(z_sum))

    # Over the classes outside the K: the sum of the finite log p, and how many are -inf. Both are
    # the total less the K, and -inf - -inf would be NaN.
    others = zero
    infinite = tl.full((), 0, tl.int32)
    for start in range(0, C, BLOCK):
        c = start + cols
        mask = c < C
        z = tl.load(z_ptr + row * Z_ROW + c, mask=mask, other=float("-inf")).to(tl.float32)
        log_p = z - z_max - z_log
        others += tl.sum(tl.where(log_p == float("-inf"), 0.0, log_p))
        infinite += tl.sum(((log_p == float("-inf")) & mask).to(tl.int32))
        if dz_ptr is not None:
            dz = (tl.exp(log_p) * total - rest) * inv_B
            tl.store(dz_ptr + row * C + c, dz, mask=mask)

    if dz_ptr is not None:
        tl.debug_barrier()  # the K places are written a second time, by other threads
    loss = zero
    for start in range(0, K, BLOCK_K):
        k = start + pairs
        i = tl.load(i_ptr + row * I_ROW + k, mask=k < K, other=0)
        mask = (k < K) & (i >= 0) & (i < C)
        q = tl.load(q_ptr + row * Q_ROW + k, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * Z_ROW + i, mask=mask, other=0.0).to(tl.float32)
        log_p = tl.where(mask, z - z_max - z_log, 0.0)
        loss -= tl.sum(_q_log_p(q, log_p))
        others -= tl.sum(tl.where(log_p == float("-inf"), 0.0, log_p))
        infinite -= tl.sum((log_p == float("-inf")).to(tl.int32))
        if dz_ptr is not None:
            dz = (tl.exp(log_p) * total - q) * inv_B
            tl.store(dz_ptr + row * C + i, dz, mask=mask)
    loss -= rest * others
    tl.store(loss_ptr + row, tl.where((rest > 0.0) & (infinite > 0), float("inf"), loss))


@cache
def meta(C: int, K: int) -> dict:
    """Tiles and warps by rule: a thread holds 8 classes.

    A row of more than 2048 classes is read twice, the second time from the cache. With blocks of
    4096 Triton 3.6's ptxas spills on sm_70.
    """
    BLOCK = min(triton.next_power_of_2(C), 2048)
    BLOCK_K = min(triton.next_power_of_2(K), 1024)
    return {"BLOCK": BLOCK, "BLOCK_K": BLOCK_K, "num_warps": max(BLOCK // 256, 1)}


def _alloc(logits, grad):
    """What forward returns; also its fake, so the two cannot differ."""
    shapes = ((), logits.shape if grad else (0,))
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in shapes)


@_dispatch.custom_op("deit_fast::sparse_cross_entropy")
def _fwd(logits: Tensor, indices: Tensor, probs: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    loss, dz = _alloc(logits, grad)
    (B, C), K = logits.shape, indices.shape[1]
    rows = logits.new_empty(B, dtype=torch.float32)
    if B > 0:
        z, i, q = (_rows(x) for x in (logits, indices, probs))
        with torch.cuda.device_of(z):  # Triton launches on the current device; a no-op on CPU
            _plans.launch(_sparse_cross_entropy_kernel, (B,),
                z, i, q, rows, dz if grad else None, 1.0 / B, C=C, K=K, Z_ROW=z.stride(0),
                I_ROW=i.stride(0), Q_ROW=q.stride(0), **meta(C, K),
            )  # fmt: skip
    return rows.mean(), dz


@_fwd.register_fake
def _(logits, indices, probs, grad):
    return _alloc(logits, grad)


_fwd.register_flops(_dispatch.no_flops)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)  # no zeros for dz, which the caller never sees


def _backward(ctx, dloss, _):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sparse_cross_entropy: backward with create_graph=True needs second derivatives, which "
            "the kernel has not; use implementation='torch'"
        )
    (grad,) = ctx.saved_tensors
    dz = torch.mul(grad, dloss, out=grad.new_empty(grad.shape, dtype=ctx.dtype))
    return dz, None, None, None


_fwd.register_autograd(_backward, setup_context=_save)


def _check(logits, indices, probs):
    op = "sparse_cross_entropy"
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(
            f"{op}: logits has shape {tuple(logits.shape)}, expected (B, C) with C >= 1"
        )
    B, C = logits.shape
    if indices.dim() != 2 or not 1 <= indices.shape[1] <= C:
        raise ValueError(
            f"{op}: indices has shape {tuple(indices.shape)}, "
            f"expected ({B}, K) with K from 1 to {C}"
        )
    K = indices.shape[1]
    _checks.expect(op, logits, indices=(indices, (B, K)), probs=(probs, (B, K)))
    if indices.dtype not in INDEX_DTYPES:
        raise TypeError(f"{op}: indices has dtype {indices.dtype}, expected int64 or int32")
    for name, t in (("logits", logits), ("probs", probs)):
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected floating point")


def sparse_cross_entropy(
    logits: Tensor, indices: Tensor, probs: Tensor, implementation: str = "auto"
) -> Tensor:
    """Cross entropy of a batch with K known probabilities per row (TinyViT paper, section 3.1).

    It is `-(dense_target(indices, probs, C) * logits.log_softmax(1)).sum(1).mean()`. The gradient
    goes to the logits; indices and probs are constants. Second derivatives need "torch". B = 0
    gives NaN, the mean of nothing, as in PyTorch.

    Args:
        logits: (B, C). Floating dtypes fp32, fp16 or bf16, mixed freely; rows may be slices of
            wider ones.
        indices: (B, K), int64 or int32, 1 <= K <= C: the classes whose probabilities are known,
            each once in a row. An index outside 0..C-1 makes the loss NaN ("torch" raises as
            PyTorch does).
        probs: (B, K). The other classes share the rest to 1 equally.
        implementation: "auto" | "triton" | "torch".

    Returns:
        A scalar in fp32.

    Raises:
        ValueError: For shapes and devices that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" where no kernel can run; by backward, for a second derivative of
            the kernel.
    """
    chosen = _policy.resolve("sparse_cross_entropy", logits, implementation)
    _check(logits, indices, probs)
    if chosen == "torch":
        return sparse_cross_entropy_reference(logits, indices, probs)
    return _fwd(logits, indices, probs.detach(), _dispatch.wants_grad(logits))[0]
