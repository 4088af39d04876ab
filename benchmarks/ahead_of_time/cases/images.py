"""What reads images: DeiT's patch embedding, TinyViT's convolutions with batch norm."""

from collections.abc import Iterator

import torch

from ..case import Case, floats, integers, pointers
from ..dtypes import BATCH, BF16, FP32, TOKENS, TRITON_TYPE
from ..kernel_modules import kernel_module


def patch_embed(arch: int) -> Iterator[Case]:
    """Images as floats and as bytes, with the prefix tokens and the positions."""
    pixels = BATCH * 224 * 224 * 3
    for dtype in (BF16, FP32):
        for D in (192, 384):
            for nhwc in (False, True):
                image = torch.uint8 if nhwc else dtype
                written = BATCH * TOKENS * D
                yield Case(
                    op="patch_embed", kernel="_patch_embed_kernel", arch=arch,
                    label=f"D = {D}, {'uint8 NHWC' if nhwc else 'NCHW'}, {TRITON_TYPE[dtype]}",
                    signature=pointers("w_ptr pos_ptr prefix_ptr y_ptr", dtype)
                    | {"image_ptr": image, "b_ptr": FP32 if nhwc else dtype}
                    | integers("B D GH GW"),
                    constexprs={"C": 3, "PH": 16, "PW": 16, "T": 2, "POS_T": 2, "NHWC": nhwc},
                    meta=kernel_module("patch_embed").meta(D, dtype, nhwc),
                    bytes=pixels * image.itemsize + (written + 768 * D) * dtype.itemsize,
                    flops=2 * BATCH * 196 * D * 768, asynchronous=dtype != FP32,
                )  # fmt: skip


def patch_embed_fold(arch: int) -> Iterator[Case]:
    """Mean and standard deviation of the pixels folded into the weights."""
    names = " ".join(f"{name}_{c}" for name in ("mean", "std") for c in range(4))
    yield Case(
        op="patch_embed", label=f"fold, {TRITON_TYPE[BF16]}", kernel="_fold_pixels_kernel",
        arch=arch,
        signature=pointers("w_ptr b_ptr folded_ptr", BF16) | {"shift_ptr": FP32} | floats(names),
        constexprs={"C": 3, "PIXELS": 256}, meta={"BLOCK": 256, "num_warps": 4},
        bytes=2 * 768 * 768 * BF16.itemsize,
    )  # fmt: skip


def conv_norm(arch: int) -> Iterator[Case]:
    """TinyViT-11M's depthwise convolutions, and the folding of a norm into the other weights."""
    module = kernel_module("conv_norm")
    norm = "w_ptr weight_ptr bias_ptr mean_ptr var_ptr"
    for dtype in (BF16, FP32):
        for C, side, stride, residual in (
            (256, 56, 1, False),
            (128, 56, 2, False),
            (128, 28, 1, True),
        ):
            outputs = BATCH * C * (side // stride) ** 2
            yield Case(
                op="conv_norm", kernel="_depthwise_conv_kernel", arch=arch,
                label=f"depthwise, C = {C}, stride {stride}, {TRITON_TYPE[dtype]}",
                signature=pointers(f"{norm} x_ptr y_ptr", dtype)
                | pointers("res_ptr", dtype if residual else None)
                | integers("C Y X Y_OUT X_OUT") | floats("eps"),
                constexprs={"STRIDE": stride, "GELU": True, "EXACT": dtype == FP32},
                meta=module.DEPTHWISE_META,
                bytes=(BATCH * C * side**2 + outputs * (1 + residual)) * dtype.itemsize,
                flops=18 * outputs,
            )  # fmt: skip
        yield Case(
            op="conv_norm", kernel="_fold_batch_norm_kernel", arch=arch,
            label=f"fold, {TRITON_TYPE[dtype]}",
            signature=pointers(f"{norm} folded_ptr", dtype) | {"shift_ptr": FP32}
            | integers("K") | floats("eps"),
            meta=module.FOLD_META, bytes=2 * 256 * 1024 * dtype.itemsize,
        )  # fmt: skip
