"""quantize: rows in fp8 and int8, by a kernel of its own."""

from deit_fast.kernels import quantize, quantize_reference
from deit_fast.kernels.cases import quantize_inputs


def test_quantize(race):
    race(quantize, quantize_reference, quantize_inputs, exact=lambda x, **_: x)
