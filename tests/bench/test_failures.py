"""Errors after which a process can measure nothing."""

import pytest
import torch

from deit_fast.bench.correctness import Mismatch
from deit_fast.bench.failures import device_is_lost


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED at gemm"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error"), False),
        (Mismatch("relative error nan"), False),
    ],
)  # fmt: skip
def test_errors_after_which_a_process_measures_nothing(error, lost):
    assert device_is_lost(error) == lost
