"""DeiT's training loss, with true labels and a teacher, and both its gradients in one kernel.

    p = softmax(z)     CE = -sum_c q_c log p_c                          z: class_logits, q: target
    none               L = CE
    hard, eq. 3        L = (1 - a) CE - a log softmax(d)_k,   k = argmax t                  a = 1/2
    soft, eq. 2        L = (1 - a) CE + a tau^2 KL,           KL = sum_c u_c (log u_c - log v_c)
                       u = softmax(t / tau), v = softmax(d / tau)                  a = 0.1, tau = 3

of each row, then the mean over rows: KL is the batch mean, as in the paper, not the official code's
mean over rows and classes. d: dist_logits, t: teacher_logits. q is given, or made of a label y with
smoothing e: q_c = (1 - e) [c = y] + e / C. Backward, per row, times dL / B:
    dz = (1 - a) (p sum(q) - q)     dd = a (softmax(d) - [c = k])     or     a tau (v - u)

B rows, C classes. Arithmetic is fp32 whatever the dtypes, which may all differ. 0 log 0 is 0: a
class of logit -inf costs nothing where its target is 0. A label outside 0..C-1 makes the row NaN,
loss and gradient, and so does a NaN among its logits, the teacher's included. No rows: NaN, as in
PyTorch. Saved tensors: dz and dd in fp32. They are rounded after the multiplication with dL: a loss
scale, which arrives with dL, could not bring back what fp16 had flushed to zero.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _dispatch, _plans, _policy

DISTILLATIONS = ("none", "soft", "hard")
ALPHA = {"none": 0.0, "soft": 0.1, "hard": 0.5}  # the paper's weight of the teacher
_IGNORE_NONE = torch.iinfo(torch.int64).min  # by default PyTorch ignores rows labelled -100


def distillation_loss_reference(
    class_logits: Tensor, dist_logits: Tensor | None, target: Tensor,
    teacher_logits: Tensor | None = None, distillation: str = "hard", alpha: float | None = None,
    temperature: float = 3.0, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`distillation_loss` in PyTorch's operations: the definition of right."""
    alpha = ALPHA[distillation] if alpha is None else alpha
    z, d, t = (_at_least_fp32(x) for x in (class_logits, dist_logits, teacher_logits))
    if target.is_floating_point():
        ce = -_sum_q_log_p(target.detach().to(z.dtype), F.log_softmax(z, 1)).mean()
    else:
        ce = F.cross_entropy(
            z, target, ignore_index=_IGNORE_NONE, label_smoothing=label_smoothing
        )  # fmt: skip
    if distillation == "none":
        return ce
    t = t.detach()
    if distillation == "hard":
        rows = F.cross_entropy(d, t.argmax(1), reduction="none")
        taught = rows.masked_fill(t.isnan().any(1), torch.nan)  # argmax takes NaN for the largest
    else:
        log_u, log_v = (F.log_softmax(x / temperature, 1) for x in (t, d))
        kl = F.kl_div(log_v, log_u, reduction="none", log_target=True)
        taught = temperature**2 * kl.masked_fill(log_u == -torch.inf, 0.0).sum(1)
    return (1 - alpha) * ce + alpha * taught.mean()


def _at_least_fp32(x):
    """Half precision in fp32, as autocast does for a loss; None stays None."""
    return x if x is None or x.dtype == torch.float64 else x.float()


def _sum_q_log_p(q, log_p):
    """Sum q_c log p_c over c, where 0 log 0 is 0; F.cross_entropy would make it NaN."""
    return (q * log_p.masked_fill((q == 0) & (log_p == -torch.inf), 0.0)).sum(1)


@triton.jit
def _add_block(x, x_max, x_sum):
    """Online softmax: the maximum, and the sum of exp(x - maximum), with one more block."""
    new = tl.maximum(x_max, tl.max(x, axis=0))
    shift = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far
    return new, x_sum * tl.exp(x_max - shift) + tl.sum(tl.exp(x - shift), axis=0)


@triton.jit
def _q_log_p(q, log_p):
    """Compute q log p, where 0 log 0 is 0 and NaN stays NaN."""
    return q * tl.where((q == 0.0) & (log_p == float("-inf")), 0.0, log_p)


@triton.jit
def _distillation_loss_kernel(
    z_ptr, d_ptr, y_ptr, t_ptr,  # in:  (B, C) (B, C) or None, (B,) or (B, C), (B, C) or None
    loss_ptr, dz_ptr, dd_ptr,  # out: (B,), (B, C) or None, (B, C) or None
    smoothing, z_scale, t_scale, d_scale, inv_tau, inv_B,
    C: tl.constexpr, Z_ROW: tl.constexpr, D_ROW: tl.constexpr, Y_ROW: tl.constexpr,
    T_ROW: tl.constexpr, SOFT_TARGET: tl.constexpr, DISTILLATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: B * C may exceed 2**31
    cols = tl.arange(0, BLOCK)
    lowest = tl.full((), float("-inf"), tl.float32)
    zero = tl.full((), 0.0, tl.float32)

    # Row statistics first. A row that fits in one block stays in registers: both loops are unrolled
    # then, and the compiler merges their loads. A wider row comes from the cache the second time.
    z_max, z_sum, q_sum = lowest, zero, zero
    d_max, d_sum, t_max, t_sum = lowest, zero, lowest, zero
    k = tl.full((), 0, tl.int32)
    for start in range(0, C, BLOCK):
        c = start + cols
        mask = c < C
        z = tl.load(z_ptr + row * Z_ROW + c, mask=mask, other=float("-inf")).to(tl.float32)
        z_max, z_sum = _add_block(z, z_max, z_sum)
        if SOFT_TARGET:
            q = tl.load(y_ptr + row * Y_ROW + c, mask=mask, other=0.0).to(tl.float32)
            q_sum += tl.sum(q, axis=0)
        if DISTILLATION != "none":
            d = tl.load(d_ptr + row * D_ROW + c, mask=mask, other=float("-inf")).to(tl.float32)
            t = tl.load(t_ptr + row * T_ROW + c, mask=mask, other=float("-inf")).to(tl.float32)
            if DISTILLATION == "soft":
                d, t = d * inv_tau, t * inv_tau
                t_max, t_sum = _add_block(t, t_max, t_sum)
            else:
                highest = tl.max(t, axis=0)
                first = tl.min(tl.where(t == highest, c, C), axis=0)
                k = tl.where(highest > t_max, first, k)  # of equal ones the first
                t_max = tl.maximum(t_max, highest)
                t_sum += tl.sum(tl.where(t != t, t, 0.0), axis=0)  # NaN where there is one
            d_max, d_sum = _add_block(d, d_max, d_sum)

    # log p = x - max - log(sum), in this order: max + log(sum), the LSE, would round away the loss
    # of a confident row
    z_log = tl.log(z_sum)
    if not SOFT_TARGET:
        label = tl.load(y_ptr + row * Y_ROW)
        z_log = tl.where((label >= 0) & (label < C), z_log, float("nan"))
        y = label.to(tl.int32)
    if DISTILLATION == "soft":
        d_log, t_log = tl.log(d_sum), tl.log(t_sum)
    elif DISTILLATION == "hard":
        d_log = tl.log(d_sum) + t_sum  # t_sum is 0 or NaN here

    loss = zero
    for start in range(0, C, BLOCK):  # stores come last: one before a load would keep it unmerged
        c = start + cols
        mask = c < C
        z = tl.load(z_ptr + row * Z_ROW + c, mask=mask, other=float("-inf")).to(tl.float32)
        log_p = z - z_max - z_log
        if SOFT_TARGET:
            q = tl.load(y_ptr + row * Y_ROW + c, mask=mask, other=0.0).to(tl.float32)
            p = tl.exp(log_p) * q_sum
        else:
            q = tl.where(c == y, 1.0 - smoothing, 0.0) + tl.where(mask, smoothing / C, 0.0)
            p = tl.exp(log_p)
        loss -= z_scale * tl.sum(_q_log_p(q, log_p), axis=0)
        if DISTILLATION != "none":
            d = tl.load(d_ptr + row * D_ROW + c, mask=mask, other=float("-inf")).to(tl.float32)
            if DISTILLATION == "soft":
                t = tl.load(t_ptr + row * T_ROW + c, mask=mask, other=float("-inf")).to(tl.float32)
                log_u = t * inv_tau - t_max - t_log
                log_v = d * inv_tau - d_max - d_log
                u = tl.exp(log_u)
                ratio = tl.where(log_u == float("-inf"), 0.0, log_u - log_v)
                loss += t_scale * tl.sum(u * ratio, axis=0)
            else:
                u = tl.where(c == k, 1.0, 0.0)
                log_v = d - d_max - d_log
                loss -= t_scale * tl.sum(_q_log_p(u, log_v), axis=0)
            if dd_ptr is not None:
                dd = (tl.exp(log_v) - u) * (d_scale * inv_B)
                tl.store(dd_ptr + row * C + c, dd, mask=mask)
        if dz_ptr is not None:
            tl.store(dz_ptr + row * C + c, (p - q) * (z_scale * inv_B), mask=mask)
    tl.store(loss_ptr + row, loss)


@cache
def meta(C: int) -> dict:
    """Tile and warps by rule.

    A thread holds 4 classes of up to four tensors, 8 of wide rows. (With 8 of a thousand classes
    Triton 3.6's ptxas spills.) A row of more than 4096 classes would take too many registers: it is
    read twice, the second time from the cache.
    """
    BLOCK = min(triton.next_power_of_2(C), 4096)
    return {"BLOCK": BLOCK, "num_warps": min(max(BLOCK // 128, 1), 16)}


def _alloc(class_logits, class_grad, dist_grad):
    """What forward returns; also its fake, so the two cannot differ."""
    shapes = ((), *(class_logits.shape if wanted else (0,) for wanted in (class_grad, dist_grad)))
    return tuple(class_logits.new_empty(shape, dtype=torch.float32) for shape in shapes)


@_dispatch.custom_op("deit_fast::distillation_loss")
def _fwd(
    class_logits: Tensor,
    dist_logits: Tensor | None,
    target: Tensor,
    teacher_logits: Tensor | None,
    distillation: str,
    alpha: float,
    temperature: float,
    label_smoothing: float,
    class_grad: bool,
    dist_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, dz, dd = _alloc(class_logits, class_grad, dist_grad)
    B, C = class_logits.shape
    rows = class_logits.new_empty(B, dtype=torch.float32)
    if B > 0:
        z, d, y, t = (_rows(x) for x in (class_logits, dist_logits, target, teacher_logits))
        Z_ROW, D_ROW, Y_ROW, T_ROW = (0 if x is None else x.stride(0) for x in (z, d, y, t))
        tau = temperature if distillation == "soft" else 1.0
        with torch.cuda.device_of(z):  # Triton launches on the current device; a no-op on CPU
            _plans.launch(_distillation_loss_kernel, (B,),
                z, d, y, t, rows, dz if class_grad else None, dd if dist_grad else None,
                label_smoothing, 1.0 - alpha, alpha * tau**2, alpha * tau, 1.0 / tau, 1.0 / B,
                C=C, Z_ROW=Z_ROW, D_ROW=D_ROW, Y_ROW=Y_ROW, T_ROW=T_ROW,
                SOFT_TARGET=target.is_floating_point(), DISTILLATION=distillation, **meta(C),
            )  # fmt: skip
    return rows.mean(), dz, dd


def _rows(x):
    """The rows as the kernel reads them: unit stride in a row, any between rows."""
    return x if x is None or x.dim() == 1 or x.stride(1) == 1 else x.contiguous()


@_fwd.register_fake
def _(class_logits, dist_logits, target, teacher_logits, distillation, alpha, temperature,
      label_smoothing, class_grad, dist_grad):  # fmt: skip
    return _alloc(class_logits, class_grad, dist_grad)


_fwd.register_flops(_dispatch.no_flops)


def _save(ctx, inputs, output):
    class_logits, dist_logits = inputs[:2]
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [
        x.dtype if wanted else None
        for x, wanted in zip((class_logits, dist_logits), inputs[-2:], strict=True)
    ]
    ctx.set_materialize_grads(False)  # no zeros for dz and dd, which the caller never sees


def _backward(ctx, dloss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "distillation_loss: backward with create_graph=True needs second derivatives, which "
            "the kernel has not; use implementation='torch'"
        )
    dz, dd = (
        dtype and torch.mul(grad, dloss, out=grad.new_empty(grad.shape, dtype=dtype))
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return dz, dd, *[None] * 8


_fwd.register_autograd(_backward, setup_context=_save)


def _check(class_logits, dist_logits, target, teacher_logits, distillation, alpha, temperature,
           label_smoothing):  # fmt: skip
    op = "distillation_loss"
    if distillation not in DISTILLATIONS:
        raise ValueError(f"{op}: distillation {distillation!r}, expected one of {DISTILLATIONS}")
    for name, t in (("dist_logits", dist_logits), ("teacher_logits", teacher_logits)):
        if (t is None) != (distillation == "none"):
            got, expected = ("None", "a tensor") if t is None else ("a tensor", "None")
            raise ValueError(
                f"{op}: {name} is {got}, expected {expected} with distillation {distillation!r}"
            )
    if class_logits.dim() != 2 or class_logits.shape[1] < 1:
        raise ValueError(
            f"{op}: class_logits has shape {tuple(class_logits.shape)}, expected (B, C) with C >= 1"
        )
    soft = target.is_floating_point()
    shape = class_logits.shape
    _checks.expect(
        op, class_logits, dist_logits=(dist_logits, shape), teacher_logits=(teacher_logits, shape),
        target=(target, shape if soft else shape[:1]),
    )  # fmt: skip
    if not soft and target.dtype != torch.int64:
        raise TypeError(f"{op}: target has dtype {target.dtype}, expected int64 or floating point")
    for name, t in (
        ("class_logits", class_logits), ("dist_logits", dist_logits),
        ("teacher_logits", teacher_logits),
    ):  # fmt: skip
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected floating point")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha {alpha}, expected 0 to 1, or None for the paper's")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature {temperature}, expected it above 0 and finite")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing {label_smoothing}, expected 0 to 1")
    if soft and label_smoothing != 0:
        raise ValueError(
            f"{op}: label_smoothing {label_smoothing} with soft targets, expected 0: "
            "Mixup smooths them"
        )


def distillation_loss(
    class_logits: Tensor,
    dist_logits: Tensor | None,
    target: Tensor,
    teacher_logits: Tensor | None = None,
    distillation: str = "hard",
    alpha: float | None = None,
    temperature: float = 3.0,
    label_smoothing: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """The loss of a batch: DeiT paper, section 4, equations 2 and 3.

        "none"   CE(class_logits, target)
        "hard"   (1 - alpha) CE(class_logits, target) + alpha CE(dist_logits, argmax teacher_logits)
        "soft"   (1 - alpha) CE(class_logits, target) + alpha temperature^2
                     KL(softmax(teacher_logits / temperature) | softmax(dist_logits / temperature))

    Gradients go to the two logits; target and teacher_logits are constants. Second derivatives need
    "torch". B = 0 gives NaN, the mean of nothing, as in PyTorch.

    Args:
        class_logits: (B, C). Logits in fp32, fp16 or bf16, mixed freely; rows may be slices of
            wider ones.
        dist_logits: (B, C), the distillation head's, or class_logits again for the paper's "usual"
            distillation through the class token; None for "none".
        target: int64 labels (B,) in 0..C-1, or probabilities (B, C) in floating point, as Mixup
            makes them. Any other label makes the loss NaN, -100 too ("torch" raises as PyTorch
            does): nothing is ignored.
        teacher_logits: (B, C); None for "none".
        distillation: "none" | "soft" | "hard".
        alpha: The teacher's weight; None: the paper's, 0.5 for "hard", 0.1 for "soft" (lambda).
        temperature: tau of "soft".
        label_smoothing: Of labels, as in F.cross_entropy; 0 with probabilities. The teacher's label
            is not smoothed.
        implementation: "auto" | "triton" | "torch".

    Returns:
        A scalar in fp32.

    Raises:
        ValueError: For shapes, devices, names and numbers that do not fit.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" where no kernel can run; by backward, for a second derivative of
            the kernel.
    """
    chosen = _policy.resolve("distillation_loss", class_logits, implementation)
    _check(class_logits, dist_logits, target, teacher_logits, distillation, alpha, temperature,
           label_smoothing)  # fmt: skip
    alpha = ALPHA[distillation] if alpha is None or distillation == "none" else alpha
    if chosen == "torch":
        return distillation_loss_reference(
            class_logits, dist_logits, target, teacher_logits, distillation, alpha, temperature,
            label_smoothing,
        )  # fmt: skip
    return _fwd(
        class_logits, dist_logits, target.detach(),
        None if teacher_logits is None else teacher_logits.detach(), distillation, float(alpha),
        float(temperature), float(label_smoothing), _dispatch.wants_grad(class_logits),
        _dispatch.wants_grad(dist_logits),
    )[0]  # fmt: skip
