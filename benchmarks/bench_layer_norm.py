"""layer_norm and add_layer_norm."""

import torch

from deit_fast.kernels import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from deit_fast.kernels.cases import layer_norm_inputs


def test_layer_norm(compare):
    compare(layer_norm, layer_norm_reference, layer_norm_inputs)


def test_add_layer_norm(compare):
    def inputs(shape, device):
        made = layer_norm_inputs(shape, device)
        return made | {"residual": torch.randn_like(made["x"])}

    compare(add_layer_norm, add_layer_norm_reference, inputs, "add_layer_norm")
