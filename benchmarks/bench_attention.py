"""attention on DeiT's shapes."""

from deit_fast.kernels import attention, attention_reference
from deit_fast.kernels.cases import attention_inputs


def test_attention(race):
    race(attention, attention_reference, attention_inputs)
