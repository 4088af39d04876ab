"""talking_heads_attention of the CaiT that has each DeiT's width."""

from deit_fast.kernels import talking_heads_attention, talking_heads_attention_reference
from deit_fast.kernels.cases import talking_heads_inputs


def make_inputs(**case):
    """Without proj_l's bias: its gradient is 0, which has no relative error."""
    return talking_heads_inputs(**case) | {"proj_l_bias": None}


def test_talking_heads(race):
    race(talking_heads_attention, talking_heads_attention_reference, make_inputs)
