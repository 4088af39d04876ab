"""talking_heads_attention against fp64: forward, and the gradients of all it reads."""

from functools import partial

import pytest
import torch
from checking import DOT_DTYPES, check

from deit_fast.kernels import (
    cases,
    talking_heads_attention,
    talking_heads_attention_reference,
)
from deit_fast.kernels.cases import talking_heads_inputs as make_inputs

triton_attention = partial(talking_heads_attention, implementation="triton")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.TALKING_HEADS, ids=str)
def test_no_less_accurate_than_torch(case, dtype, device):
    inputs = make_inputs(**case, device=device)
    check(triton_attention, talking_heads_attention_reference, inputs, dtype)
