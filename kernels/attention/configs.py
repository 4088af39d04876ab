"""Tiles of the attention kernels: the rule, its reasons, and what a tuned table may choose."""

from functools import cache

import torch
import triton
from torch import Tensor

from .. import _checks, _chips, _tuned

HEAD_DIMS = (32, 48, 64, 80)
TRAINED_HEAD_DIMS = (32, 48, 64)  # of the fused backward, where 80 would spill
# Element size in bytes -> fewest keys of a block: what one tensor-core instruction sums over (fp32
# as fp16).
LEAST_KEYS = {4: 16, 2: 16, 1: 32}


def _config(m: int, n: int, warps: int, stages: int, resident: bool = False) -> dict[str, int]:
    return {
        "RESIDENT": resident, "BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


FP32_CONFIG = _config(16, 16, 4, 2)  # FMA units: registers hold the operands too
WIDE_FP32_CONFIG = _config(16, 16, 8, 2)  # d = 80
# K and V resident, 64 queries at a time: two or three CTAs per SM.
RESIDENT_CONFIG = _config(64, 64, 4, 1, resident=True)
FEW_QUERIES_CONFIG = _config(16, 64, 4, 2)  # the prefix tokens alone
# Heads that are padded to a power of two need masks, and masks need registers.
PADDED_CONFIG, PADDED_FEW_CONFIG = _config(64, 64, 8, 2), _config(16, 64, 4, 3)
# 64 queries in 4 warps leave room for four CTAs per SM (sm_90). Blocks of 64 keys leave 198 and 578
# keys a tail of 16.
ONLINE_CONFIG = _config(64, 64, 4, 3)
CONFIGS = [
    RESIDENT_CONFIG,
    _config(128, 64, 8, 1, resident=True),
    FEW_QUERIES_CONFIG,
    ONLINE_CONFIG,
    _config(64, 64, 4, 2),
    _config(128, 64, 8, 3),
    _config(128, 64, 8, 2),
]


def configs(dtype: torch.dtype, N: int, L: int, d: int, bias: bool = False) -> list[dict[str, int]]:
    """Every configuration of the forward kernels that a tuned table may name for a shape.

    Args:
        dtype: Of q, k and v.
        N: Queries.
        L: Keys.
        d: Features per head.
        bias: Whether there is one.
    """
    if dtype == torch.float32:
        return [FP32_CONFIG if d <= 64 else WIDE_FP32_CONFIG]
    if d & (d - 1):
        return [PADDED_FEW_CONFIG if N <= 16 else PADDED_CONFIG]
    if N <= 16:
        return [FEW_QUERIES_CONFIG]
    fits = 64 < L <= 256 and not bias
    if dtype.itemsize == 1:
        return [RESIDENT_CONFIG if fits else ONLINE_CONFIG]
    return [c for c in CONFIGS if c["BLOCK_M"] >= 64 and (fits or not c["RESIDENT"])]


@cache
def meta(N: int, L: int, d: int, dtype: torch.dtype, bias: bool = False) -> dict[str, int]:
    """The configuration for a shape that no table lists.

    Arguments as those of `configs`.
    """
    offered = configs(dtype, N, L, d, bias)
    if len(offered) == 1:
        return offered[0]
    return RESIDENT_CONFIG if RESIDENT_CONFIG in offered else ONLINE_CONFIG


@cache
def meta_backward(
    N: int, L: int, dtype: torch.dtype, capability: tuple[int, int]
) -> dict[str, int]:
    """The backward kernel's tiles and tails, by rule.

    64 x 64 in 4 warps, as forward: two CTAs per SM. 32 queries on sm_80 and sm_120, where 64 spill.
    Few queries get a block just as high.

    Args:
        N: Queries.
        L: Keys.
        dtype: Of q, k and v.
        capability: The chip's compute capability.
    """
    M, block, warps, stages = 64 if _chips.is_datacenter(capability) else 32, 64, 4, 2
    if dtype == torch.float32:  # FMA units: registers hold the operands too
        M, block, warps, stages = 16, 16, 8, 1
    M = 16 if N <= 16 else M
    return {
        "BLOCK_M": M, "BLOCK_N": block, "TAIL_M": tail(N, M), "TAIL_N": tail(L, block),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@cache
def pieces(L: int, least: int = 16) -> tuple[int, int, int]:
    """The blocks of keys that the resident kernel holds: powers of two with little padding.

    198 keys are held as 128 + 64 + 16.

    Args:
        L: Keys, 64 < L <= 256.
        least: Fewest keys of a block, from `LEAST_KEYS`.

    Returns:
        Keys of each block; the third may be 0.
    """
    first = 128 if L >= 128 else 64
    rest = max(L - first, 1)
    second = max(least, 1 << rest.bit_length() - 1)
    rest = L - first - second
    return first, second, max(least, triton.next_power_of_2(rest)) if rest > 0 else 0


@cache
def tail(L: int, block: int, least: int = 16) -> int:
    """The power of two, at least `least`, that holds what whole blocks leave of L keys."""
    return max(least, triton.next_power_of_2(L % block))


@_tuned.validates("attention")
def why_not(shape: dict, choice: dict, capability: tuple[int, int]) -> str | None:
    """Why a tuned table may not name this choice for this shape; None where it may."""
    dtype = getattr(torch, str(shape.get("dtype")), None)
    if dtype not in _checks.DTYPES:
        return f"dtype {shape.get('dtype')!r}"
    sizes = [shape.get(name) for name in ("N", "L", "d")]
    if not all(isinstance(n, int) and n > 0 for n in sizes):
        return f"N, L and d are {sizes}"
    offered = configs(dtype, shape["N"], shape["L"], shape["d"], bool(shape.get("bias")))
    return _tuned.check_choice(choice, ("triton", "torch"), offered)


def choose(q: Tensor, L: int, bias: bool, implementation: str) -> tuple[str, dict[str, int]]:
    """The implementation and configuration that serve a shape: by tuned table, else by rule.

    Args:
        q: Queries (B, N, H, d).
        L: Keys.
        bias: Whether there is one.
        implementation: "auto" or "triton".

    Returns:
        "torch" or "triton", and the configuration; "torch" has an empty one.
    """
    B, N, H, d = q.shape
    shape = {"M": B * H, "N": N, "L": L, "d": d, "dtype": str(q.dtype)[6:], "bias": bias}
    found = _tuned.lookup("attention", shape, _chips.chip(q.device))
    if found is not None and implementation in ("auto", found["implementation"]):
        return found["implementation"], {k: v for k, v in found.items() if k != "implementation"}
    return "triton", meta(N, L, d, q.dtype, bias)
