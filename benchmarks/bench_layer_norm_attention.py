"""layer_norm_attention of a pre-norm block: the residual is x itself."""

from deit_fast.kernels import layer_norm_attention, layer_norm_attention_reference
from deit_fast.kernels.cases import layer_norm_attention_inputs


def pre_norm(fn):
    return lambda x, **rest: fn(x, residual=x, **rest)


def test_layer_norm_attention(compare):
    compare(
        pre_norm(layer_norm_attention),
        pre_norm(layer_norm_attention_reference),
        layer_norm_attention_inputs,
    )
