"""LayerNorm, with and without the sum before it, its backward pass, and sums of partial sums."""

from collections.abc import Iterator

from ..case import Case, floats, integers, pointers, type_names
from ..dtypes import BF16, FP32, ROWS, TRITON_TYPE
from ..kernel_modules import kernel_module


def forward(arch: int) -> Iterator[Case]:
    """DeiT's widths and the widest, fp16 as bf16."""
    module = kernel_module("layer_norm")
    for D in (192, 384, 768, module.MAX_N):
        for dtype in (BF16, FP32):
            for residual in (False, True) if D == 768 else (True,):
                yield Case(
                    op="layer_norm", kernel="_layer_norm_kernel", arch=arch,
                    label=f"{'add, ' * residual}D = {D}, {TRITON_TYPE[dtype]}",
                    signature=pointers("x_ptr w_ptr b_ptr y_ptr", dtype)
                    | pointers("res_ptr h_ptr", dtype if residual else None)
                    | integers("M N") | floats("eps"),
                    meta=module.meta(D),
                    bytes=ROWS * D * dtype.itemsize * (4 if residual else 2),
                )  # fmt: skip


def backward(arch: int) -> Iterator[Case]:
    """With the gradient that is added to dx, alone and with LN(x) written once more.

    fp32 beside half precision is a residual stream under autocast.
    """
    module = kernel_module("layer_norm")
    for D in (192, 384, 768, module.MAX_N):
        for stream, dtype in ((BF16, BF16), (FP32, BF16)):
            for again in (False, True):
                yield Case(
                    op="layer_norm", kernel="_layer_norm_backward_kernel", arch=arch,
                    label=f"backward, {'LN(x), ' * again}D = {D}, {type_names(stream, dtype)}",
                    signature=pointers("h_ptr dx_ptr w_ptr dh_ptr", stream)
                    | pointers("b_ptr", stream if again else None)
                    | pointers("y_ptr", dtype if again else None)
                    | {"dy_ptr": dtype, "sums_ptr": FP32} | integers("M N") | floats("eps"),
                    meta=module.meta_backward(D),
                    bytes=ROWS * D * (3 * stream.itemsize + (1 + again) * dtype.itemsize),
                )  # fmt: skip


def column_sums(arch: int) -> Iterator[Case]:
    """All matrices, as of DeiT-B's attention with LayerScale, and a LayerNorm's two alone."""
    module, D = kernel_module("column_sums"), 768
    for dtype in (BF16, FP32):
        for count, columns in ((module.MAX_MATRICES, 7 * D), (2, 2 * D)):
            each = range(count)
            yield Case(
                op="column_sums", kernel="_column_sums_kernel", arch=arch,
                label=f"{count} matrices, {TRITON_TYPE[dtype]}",
                signature=pointers(" ".join(f"x{i}_ptr" for i in each), FP32)
                | pointers(" ".join(f"y{i}_ptr" for i in each), dtype)
                | integers(" ".join(f"P{i} N{i} x{i}_row" for i in range(module.MAX_MATRICES))),
                meta=module.META, bytes=ROWS // 128 * columns * 4,
            )  # fmt: skip
