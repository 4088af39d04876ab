"""attention_quantized: o in FP8 (per-tensor scale) or INT8 (per-row and head scales).

q, k and v are in the model's dtype or, in the cases "fp8 operands", in FP8.
"""

from deit_fast.kernels import (
    attention_quantized,
    attention_quantized_reference,
    attention_reference,
    dequantize,
)
from deit_fast.kernels.cases import attention_quantized_inputs


def ours(qkv=None, **rest):
    return attention_quantized(**rest, **unbound(qkv))


def reference(qkv=None, **rest):
    return attention_quantized_reference(**rest, **unbound(qkv))


def exact(qkv=None, q=None, k=None, v=None, **_):
    if qkv is not None:
        q, k, v = dequantize(qkv).unbind(2)
    return attention_reference(q, k, v).flatten(2)


def unbound(qkv):
    if qkv is None:
        return {}
    q, k, v = qkv.values.unbind(2)
    return {"q": q, "k": k, "v": v, "in_scale": qkv.scales}


def test_attention_quantized(race):
    race(ours, reference, attention_quantized_inputs, exact=exact)
