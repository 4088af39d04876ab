"""The same model as each chip would run it, interpreted: the choices of the policy, computed."""

import copy

import pytest
import torch
from checking import assert_as_accurate
from modelling import images, tiny_pair

from deit_fast.kernels import _tuned
from deit_fast.kernels._chips import Chip, simulate_device

CHIPS = [
    Chip("Tesla V100", (7, 0), 80),
    Chip("Tesla T4", (7, 5), 40),
    Chip("NVIDIA A100", (8, 0), 108),
    Chip("NVIDIA H200", (9, 0), 132),
    Chip("NVIDIA B200", (10, 0), 148),
]
on_cpu = pytest.mark.cpu("a real chip is not simulated")


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_logits_on_every_chip(chip, dtype):
    reference, fast = tiny_pair("auto", depth=2)
    x = images(reference, batch=24).to(dtype)
    reference, fast = reference.to(dtype), fast.to(dtype)
    exact = copy.deepcopy(reference).double()
    with torch.no_grad(), simulate_device(chip), _tuned.disabled():
        assert_as_accurate(fast(x), reference(x), exact(x.double()))


@on_cpu
@pytest.mark.parametrize("chip", CHIPS[:3], ids=lambda chip: chip.name)
def test_gradients_on_every_chip(chip):
    reference, fast = tiny_pair("auto", depth=1)
    x = images(reference)
    upstream = torch.randn(2, 11)
    exact = copy.deepcopy(reference).double()
    exact(x.double()).backward(upstream.double())
    reference(x).backward(upstream)
    with simulate_device(chip):
        fast(x).backward(upstream)
    for (name, p), q, r in zip(
        fast.named_parameters(), reference.parameters(), exact.parameters(), strict=True
    ):
        assert_as_accurate(p.grad, q.grad, r.grad, name)
