"""Random weights: every part matters, and activations stay in range."""

import pytest
from checking import assert_differ
from measuring import CPU
from torch import nn

from deit_fast.bench.modes import MODES
from deit_fast.bench.step import Step
from deit_fast.bench.weights import random_images


@pytest.mark.slow
def test_every_part_matters_for_the_output(vit, convnet):
    """Or a wrong part would go unnoticed: each parameter, zeroed, changes the logits."""
    for network in (vit, convnet):
        step = Step(network, MODES["eager_fp32"])
        expected = step(network.images)
        for name, p in step.model.named_parameters():
            before = p.detach().clone()
            p.data.zero_()
            if name.endswith("qkv.bias"):  # the keys' third cannot matter, the rest must
                p.data[p.numel() // 3 : 2 * p.numel() // 3] = 0
            assert_differ(step(network.images), expected, name)
            p.data.copy_(before)


def test_batch_norm_keeps_activations_in_range(convnet):
    """At inference every batch norm normalizes: its statistics are those of its input."""
    step, seen = Step(convnet, MODES["eager_fp32"]), []

    def look(m, inputs, y):
        normal = (y - m.bias[:, None, None]) / m.weight[:, None, None]
        seen.append(normal.std().item())

    norms = [m for m in step.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.register_forward_hook(look)
    step(random_images(8, 64, CPU, seed=9))
    assert len(seen) == len(norms) == 20 and 0.6 < min(seen) <= max(seen) < 1.6
    assert all(m.momentum == 0.1 and not m.training for m in norms)
