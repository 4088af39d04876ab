"""window_attention of TinyViT's last three stages."""

from deit_fast.kernels import window_attention, window_attention_reference
from deit_fast.kernels.cases import window_attention_inputs


def test_window_attention(compare):
    compare(window_attention, window_attention_reference, window_attention_inputs)
