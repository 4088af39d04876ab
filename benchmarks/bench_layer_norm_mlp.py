"""layer_norm_mlp of a pre-norm block: the residual is x itself."""

from deit_fast.kernels import layer_norm_mlp, layer_norm_mlp_reference
from deit_fast.kernels.cases import layer_norm_mlp_inputs


def inputs(**case):
    return {k: v for k, v in layer_norm_mlp_inputs(**case).items() if k != "residual"}


def pre_norm(fn):
    return lambda x, **rest: fn(x, residual=x, **rest)


def test_layer_norm_mlp(compare):
    compare(pre_norm(layer_norm_mlp), pre_norm(layer_norm_mlp_reference), inputs)
