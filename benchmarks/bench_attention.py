"""attention on DeiT's shapes."""

from deit_fast.kernels import attention, attention_reference
from deit_fast.kernels.cases import attention_inputs


def test_attention(compare):
    compare(attention, attention_reference, attention_inputs)
