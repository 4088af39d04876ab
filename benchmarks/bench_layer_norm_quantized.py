"""layer_norm_quantized: rows normalised and written in fp8 and int8, with their scales."""

from deit_fast.kernels import (
    layer_norm_quantized,
    layer_norm_quantized_reference,
    layer_norm_reference,
)
from deit_fast.kernels.cases import layer_norm_inputs


def inputs(shape, format, device):
    return layer_norm_inputs(shape, device) | {"format": format}


def exact(format, **rest):
    return layer_norm_reference(**rest)


def test_layer_norm_quantized(compare):
    compare(layer_norm_quantized, layer_norm_quantized_reference, inputs, exact=exact)
