"""Every shipped kernel configuration.

layer_norm.py   LayerNorm, forward and backward, sums of partial sums
losses.py       distillation loss, sparse cross-entropy
linear.py       GEMMs with their epilogues, folded LayerNorm, fused MLP
quantized.py    quantization and the FP8 and INT8 GEMMs
attention.py    attention, also with a quantized result, forward and backward
variants.py     attention with talking heads and in windows
images.py       patch embedding, convolutions with batch norm
classifier.py   the last norm and the heads
"""

from collections.abc import Iterable, Iterator

from ..case import Case
from ..dtypes import FP8, INT8
from . import attention, classifier, images, layer_norm, linear, losses, quantized, variants

DOT_ARCHS = (80, 90)  # with bf16 tensor cores; sm_89's tiles are sm_80's
QUANTIZED_FORMATS = {80: (INT8,), 89: (FP8, INT8), 90: (FP8, INT8)}

OF_QUANTIZED = (
    quantized.quantize, quantized.layer_norm, quantized.quantized_linear, attention.quantized,
)  # fmt: skip
OF_ANY = (
    layer_norm.forward, losses.distillation_loss, losses.sparse_cross_entropy, layer_norm.backward,
    layer_norm.column_sums, linear.epilogue, linear.backward, images.conv_norm,
)  # fmt: skip
OF_DOTS = (
    linear.forward, linear.one_row, linear.layer_norm_linear, linear.layer_norm_prologue,
    linear.layer_norm_mlp, attention.forward, attention.backward, variants.talking_heads,
    images.patch_embed, images.patch_embed_fold, classifier.forward, variants.window_attention,
)  # fmt: skip


def cases(archs: Iterable[int]) -> Iterator[Case]:
    """The cases for some chips.

    Args:
        archs: Compute capabilities, 90 for 9.0.

    Yields:
        One chip's cases after the other's. sm_89 has the quantized ones only: all else is as on
        sm_80.
    """
    for arch in archs:
        for dtype in QUANTIZED_FORMATS.get(arch, ()):
            for family in OF_QUANTIZED:
                yield from family(arch, dtype)
        if arch == 89:
            continue
        for family in (*OF_ANY, *(OF_DOTS if arch in DOT_ARCHS else ())):
            yield from family(arch)
