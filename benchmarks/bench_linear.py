"""linear: qkv, proj, fc1 with GELU, fc2, the last three with their epilogues."""

from deit_fast.kernels import linear, linear_reference
from deit_fast.kernels.cases import linear_inputs

OTHERS = ("cublas",)


def test_linear(race):
    race(linear, linear_reference, linear_inputs)
