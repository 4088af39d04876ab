"""Networks that many tests measure; no test changes them."""

import pytest
from measuring import CPU

from deit_fast.bench.network import Network


@pytest.fixture(scope="session")
def vit():
    return Network("deit_tiny_distilled", 32, CPU, "DeiT-Ti distilled")


@pytest.fixture(scope="session")
def convnet():
    return Network("resnet18", 64, CPU)
