"""The fixture `device`: without it a test sees what a machine with a GPU does to CPU tensors."""

import os

import pytest
import torch
from checking import assert_close

from deit_fast.kernels import layer_norm, layer_norm_reference
from deit_fast.kernels._chips import Chip, simulate_device


def inputs(device="cpu"):
    return torch.ones(2, 64, device=device), *torch.ones(2, 64, device=device)


def test_without_it_no_kernel_takes_a_cpu_tensor():
    """In any order of the tests: nor where a chip is simulated, nor in child processes."""
    with pytest.raises(RuntimeError, match="needs a CUDA tensor, x is on cpu"):
        layer_norm(*inputs(), implementation="triton")
    with simulate_device(Chip("H200", (9, 0), 132)):
        with pytest.raises((RuntimeError, ValueError), match="got CPU tensors|cpu tensor"):
            layer_norm(*inputs(), implementation="triton")
    assert "TRITON_INTERPRET" not in os.environ


def test_with_it_kernels_run(device):
    got = layer_norm(*inputs(device), implementation="triton")
    assert_close(got, layer_norm_reference(*inputs(device)))


@pytest.mark.cpu("the interpreter")
def test_tests_of_a_cpu_alone_need_not_ask():
    assert_close(layer_norm(*inputs(), implementation="triton"), layer_norm_reference(*inputs()))
