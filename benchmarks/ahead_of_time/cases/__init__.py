"""Every shipped kernel configuration.

layer_norm.py   LayerNorm, forward and backward
losses.py       distillation loss, sparse cross-entropy
linear.py       GEMMs with their epilogues, folded LayerNorm, fused MLP
quantized.py    quantization and the FP8 and INT8 GEMMs
attention.py    attention, also with a quantized result, forward and backward
variants.py     attention with talking heads and in windows
images.py       patch embedding, convolutions with batch norm
classifier.py   the last norm and the heads
"""

from collections.abc import Iterable, Iterator

from ..case import FP8, INT8, Case
from . import attention, classifier, images, layer_norm, linear, losses, quantized, variants

DOT_ARCHS = (80, 90)  # with bf16 tensor cores; sm_89's tiles are sm_80's
QUANTIZED_FORMATS = {80: (INT8,), 89: (FP8, INT8), 90: (FP8, INT8)}


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
            yield from quantized.quantize(arch, dtype)
            yield from quantized.layer_norm(arch, dtype)
            yield from quantized.quantized_linear(arch, dtype)
            yield from attention.quantized(arch, dtype)
        if arch == 89:
            continue
        yield from layer_norm.forward(arch)
        yield from losses.distillation_loss(arch)
        yield from losses.sparse_cross_entropy(arch)
        yield from layer_norm.backward(arch)
        yield from linear.epilogue(arch)
        yield from linear.backward(arch)
        yield from images.conv_norm(arch)
        if arch in DOT_ARCHS:
            yield from linear.forward(arch)
            yield from linear.one_row(arch)
            yield from linear.layer_norm_linear(arch)
            yield from linear.layer_norm_mlp(arch)
            yield from attention.forward(arch)
            yield from attention.backward(arch)
            yield from variants.talking_heads(arch)
            yield from images.patch_embed(arch)
            yield from images.patch_embed_fold(arch)
            yield from classifier.forward(arch)
            yield from variants.window_attention(arch)
