"""The last norm and the heads, of the prefix tokens."""

from collections.abc import Iterator

from ..case import Case, floats, integers, pointers
from ..dtypes import BATCH, BF16, FP32, TRITON_TYPE
from ..kernel_modules import kernel_module


def forward(arch: int) -> Iterator[Case]:
    """The heads' logits averaged in the kernel, or apart, for the average after a softmax."""
    names = "x_ptr nw_ptr nb_ptr w0_ptr b0_ptr w1_ptr b1_ptr"
    for dtype in (BF16, FP32):
        for D, fusion in ((192, "joint"), (768, "joint"), (768, "joint_softmax")):
            separate = fusion == "joint_softmax"
            yield Case(
                op="classifier", kernel="_classifier_kernel", arch=arch,
                label=f"D = {D}, {fusion}, {TRITON_TYPE[dtype]}",
                signature=pointers(names, dtype) | {"y_ptr": FP32 if separate else dtype}
                | integers("B C x_batch") | floats("eps factor"),
                constexprs={"D": D, "FIRST": 0, "LAST": 2, "SEPARATE": separate},
                meta=kernel_module("classifier").meta(dtype),
                bytes=(2 * BATCH * D + 2 * 1000 * D + 1000 * BATCH) * dtype.itemsize,
                flops=4 * BATCH * 1000 * D,
            )  # fmt: skip
