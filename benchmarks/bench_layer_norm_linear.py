"""layer_norm_linear: qkv and fc1 with the LayerNorm before them.

Ours is what the rule chooses for the batch; also in the GEMM's prologue, and as two operations.
"""

from deit_fast.kernels import layer_norm_linear, layer_norm_linear_reference
from deit_fast.kernels.cases import layer_norm_linear_inputs

OTHERS = ("prologue", "cublas")


def test_layer_norm_linear(compare):
    compare(layer_norm_linear, layer_norm_linear_reference, layer_norm_linear_inputs)
