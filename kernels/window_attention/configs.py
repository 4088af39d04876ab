"""Tiles of the window attention kernels, by rule."""

import torch

from .. import _chips

HEAD_DIM = 32
BIASES_META = {"BLOCK": 64, "num_warps": 2}


def meta(dtype: torch.dtype) -> dict[str, int]:
    """The forward kernel's tile: 64 queries and 32 keys at a time.

    With 64 keys the addresses of the biases alone would spill.

    Args:
        dtype: Of qkv.
    """
    m, n = (16, 16) if dtype == torch.float32 else (64, 32)  # FMA units: registers hold operands
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 2}


def meta_backward(
    dtype: torch.dtype, capability: tuple[int, int], scores: bool = False
) -> dict[str, int]:
    """A backward kernel's tile: 64 x 64 in 4 warps.

    The kernel that sums the gradient of the scores has 8 warps, since it holds them twice, and one
    stage. On sm_80 both have one stage: with two, Triton 3.6 would spill.

    Args:
        dtype: Of qkv.
        capability: The chip's compute capability.
        scores: Whether the kernel is that of the gradient of the scores.
    """
    block, warps = (16, 4) if dtype == torch.float32 else (64, 8 if scores else 4)
    stages = 1 if scores or not _chips.is_datacenter(capability) else 2
    return {"BLOCK": block, "num_warps": warps, "num_stages": stages}
