"""quantized_linear: qkv, proj, fc1 with GELU, fc2 in fp8 and int8, with all that follows the
product; beside them `linear` on the same numbers in bf16 (fp16 on a GPU without it)."""

import torch

from deit_fast.kernels import dequantize, linear, quantized_linear, quantized_linear_reference
from deit_fast.kernels.cases import quantized_linear_inputs

OTHERS = ("bf16",)


def inputs(**case):
    made = quantized_linear_inputs(**case)
    return made | {"wide_x": dequantize(made["x"]), "wide_weight": dequantize(made["weight"])}


def product(wide_x, wide_weight, implementation="auto", **rest):
    if implementation == "bf16":
        bias, activation, residual = (rest.get(k) for k in ("bias", "activation", "residual"))
        return linear(wide_x, wide_weight, bias, activation, residual)
    return quantized_linear(**rest)


def reference(wide_x, wide_weight, **rest):
    return quantized_linear_reference(**rest)


def exact(wide_x, wide_weight, dtype=None, format=None, out_scale=None, **rest):
    return quantized_linear_reference(**rest, dtype=torch.float32)


def test_quantized_linear(race):
    def reads(made):
        return {"wide_x": None, "wide_weight": None}

    race(product, reference, inputs, reads=reads, exact=exact)
