"""Tiles of the talking-heads kernels: by heads, because a program holds all of them."""

from functools import cache

import torch
import triton

SPLITS = {32: 16, 48: 32}  # d: the first of the two powers of two it is the sum of


def _config(m: int, n: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


# Heads, padded to a power of two -> forward, dq, dk and dv. A warp takes whole heads, so 4 warps
# serve 4 and fewer. Tiles are the largest that leave registers to spare.
CONFIGS = {
    4: (_config(32, 32, 4, 2), _config(32, 16, 4, 2), _config(32, 16, 4, 2)),
    8: (_config(32, 32, 8, 2), _config(16, 32, 8, 2), _config(32, 16, 8, 2)),
    16: (_config(16, 16, 8, 2), _config(16, 16, 8, 1), _config(16, 16, 8, 1)),
}
# FMA units: registers hold the operands too, and 16 heads never fit
FP32_CONFIGS = {
    4: (_config(16, 16, 8, 1),) * 3,
    8: (_config(16, 16, 8, 1), _config(8, 16, 8, 1), _config(16, 8, 8, 1)),
}


@cache
def configs(H: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """The configurations of the three kernels: forward, dq, and dk and dv.

    Args:
        H: Heads.
        dtype: Of qkv.
    """
    of = FP32_CONFIGS if dtype == torch.float32 else CONFIGS
    return of[max(4, triton.next_power_of_2(H))]


@cache
def sizes(H: int, d: int) -> dict[str, int]:
    """The constexprs that the three kernels share, for H heads of d features."""
    return {"H": H, "D": d, "HEADS": triton.next_power_of_2(H), "SPLIT": SPLITS[d]}


def why_not(H: int, d: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why the Triton kernels do not take a shape; None if they do.

    Args:
        H: Heads.
        d: Features per head.
        dtype: Of qkv.
    """
    most = max(FP32_CONFIGS if dtype == torch.float32 else CONFIGS)
    if not 1 <= H <= most:
        return f"{H} heads in {dtype}, the kernel takes 1 to {most}"
    if d not in SPLITS:
        return f"head dimension {d}, the kernel takes {tuple(SPLITS)}"
    return None
