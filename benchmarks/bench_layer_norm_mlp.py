"""layer_norm_mlp."""

from deit_fast.kernels import layer_norm_mlp, layer_norm_mlp_reference
from deit_fast.kernels.cases import layer_norm_mlp_inputs


def test_layer_norm_mlp(race):
    race(layer_norm_mlp, layer_norm_mlp_reference, layer_norm_mlp_inputs)
