"""conv_norm: TinyViT's MBConv, its three convolutions, and the local_conv of a block."""

from deit_fast.kernels import conv_norm, conv_norm_reference
from deit_fast.kernels.cases import conv_norm_inputs


def test_conv_norm(compare):
    compare(conv_norm, conv_norm_reference, conv_norm_inputs)
