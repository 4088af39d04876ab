"""The losses, with their gradients as in training."""

from collections.abc import Iterator

import torch

from ..case import Case, floats, pointers
from ..dtypes import BATCH, BF16, FP16, FP32, TRITON_TYPE
from ..kernel_modules import kernel_module

# classes, dtype of the logits, kind of distillation, whether the targets are soft (Mixup); 21,841
# classes make a loop over blocks
DISTILLATION = (
    (1000, BF16, "none", False), (1000, BF16, "hard", False), (1000, FP32, "hard", False),
    (1000, BF16, "soft", True), (1000, FP32, "soft", True), (21_841, BF16, "soft", True),
)  # fmt: skip
# classes, pairs a row, dtypes of the logits, of the indices and of the probabilities; 21,841
# classes and 1500 pairs make loops over blocks
SPARSE = (
    (1000, 10, BF16, torch.int64, FP16), (1000, 10, FP16, torch.int64, FP16),
    (1000, 10, FP32, torch.int64, FP16), (1000, 10, BF16, torch.int32, FP32),
    (21_841, 100, BF16, torch.int64, FP16), (21_841, 1500, BF16, torch.int64, FP16),
    (2048, 100, FP32, torch.int64, FP16),
)  # fmt: skip


def distillation_loss(arch: int) -> Iterator[Case]:
    """The loss and the gradients of both heads' logits."""
    for C, dtype, distillation, soft_target in DISTILLATION:
        taught = distillation != "none"
        signature = {"z_ptr": dtype, "y_ptr": dtype if soft_target else torch.int64}
        signature |= pointers("d_ptr t_ptr", dtype if taught else None)
        signature |= {"loss_ptr": FP32, "dz_ptr": FP32, "dd_ptr": FP32 if taught else None}
        strides = {"Z_ROW": C, "D_ROW": C, "T_ROW": C, "Y_ROW": C if soft_target else 1}
        kind = {"SOFT_TARGET": soft_target, "DISTILLATION": distillation}
        read, written = 1 + 2 * taught + soft_target, 1 + taught
        targets = "Mixup" if soft_target else "labels"
        yield Case(
            op="distillation_loss", kernel="_distillation_loss_kernel", arch=arch,
            label=f"{distillation}, {targets}, C = {C}, {TRITON_TYPE[dtype]}",
            signature=signature | floats("smoothing z_scale t_scale d_scale inv_tau inv_B"),
            constexprs={"C": C} | strides | kind,
            meta=kernel_module("distillation_loss").meta(C),
            bytes=BATCH * C * (read * dtype.itemsize + written * 4),
        )  # fmt: skip


def sparse_cross_entropy(arch: int) -> Iterator[Case]:
    """The loss of the pairs (class, probability) of a soft-label store, and its gradient."""
    for C, K, dtype, indices, probs in SPARSE:
        types = ", ".join(TRITON_TYPE[kind] for kind in (dtype, indices, probs))
        yield Case(
            op="sparse_cross_entropy", kernel="_sparse_cross_entropy_kernel", arch=arch,
            label=f"C = {C}, K = {K}, {types}",
            signature={"z_ptr": dtype, "i_ptr": indices, "q_ptr": probs}
            | pointers("loss_ptr dz_ptr", FP32) | floats("inv_B"),
            constexprs={"C": C, "K": K, "Z_ROW": C, "I_ROW": K, "Q_ROW": K},
            meta=kernel_module("sparse_cross_entropy").meta(C, K),
            bytes=BATCH * (C * (dtype.itemsize + 4) + K * (indices.itemsize + probs.itemsize)),
        )  # fmt: skip
