"""quantized_linear: qkv, proj, fc1 with GELU, fc2 in FP8 and INT8, with their epilogues.

"eager" and "compiled" multiply dequantized operands in fp32: baselines of accuracy, not of speed.
"bf16" is `linear` on the same numbers in bf16 (fp16 on a GPU without it). "cublas" is PyTorch's
quantized matmul, torch._scaled_mm or torch._int_mm, with a compiled epilogue. Those take no
per-group scales: the groups of an INT8 row share one scale here, so that all compute the same.
"""

import torch
from torch.nn import functional as F

from deit_fast.kernels import (
    Quantized,
    dequantize,
    linear,
    quantize_reference,
    quantized_linear,
    quantized_linear_reference,
)
from deit_fast.kernels.cases import quantized_linear_inputs
from deit_fast.kernels.quantized_linear.reference import quantize_result

OTHERS = ("bf16", "cublas")


def inputs(**case):
    made = quantized_linear_inputs(**case)
    x, groups = made["x"], len(made["x"].scales)
    if groups > 1:
        x = quantize_reference(dequantize(x), case["of"])
        made["x"] = Quantized(x.values, x.scales.expand(groups, -1).contiguous())
    return made | {"wide_x": dequantize(x), "wide_weight": dequantize(made["weight"])}


def cublas(
    x, weight, bias, activation, residual=None, dtype=torch.bfloat16, format=None, out_scale=None
):
    rows, w = x.values.flatten(0, -2), weight.values.t()
    scale = x.scales[:1].t().expand(len(rows), 1).contiguous()
    if rows.dtype == torch.int8:
        y = torch._int_mm(rows, w) * scale * weight.scales + bias
    else:
        y = torch._scaled_mm(
            rows, w, scale, weight.scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    y = y.unflatten(0, x.values.shape[:-1]).float()
    if activation == "gelu":
        y = F.gelu(y)
    if out_scale is not None or format is not None:
        return quantize_result(y, format, out_scale)
    return (y if residual is None else y + residual).to(dtype)


compiled_cublas = torch.compile(cublas, dynamic=False)


def matmul(wide_x, wide_weight, implementation="auto", **rest):
    if implementation == "bf16":
        bias, activation, residual = (rest.get(k) for k in ("bias", "activation", "residual"))
        return linear(wide_x, wide_weight, bias, activation, residual)
    if implementation == "cublas":
        return compiled_cublas(**rest)
    return quantized_linear(**rest)


def reference(wide_x, wide_weight, **rest):
    return quantized_linear_reference(**rest)


def exact(wide_x, wide_weight, dtype=None, format=None, out_scale=None, **rest):
    return quantized_linear_reference(**rest, dtype=torch.float32)


def test_quantized_linear(race):
    def reads(made):
        return {"wide_x": None, "wide_weight": None}

    race(matmul, reference, inputs, reads=reads, exact=exact)
