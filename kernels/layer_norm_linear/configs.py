"""Tiles of the prologue kernel, and which implementation serves a shape."""

import torch
from torch import Tensor

from .. import _checks, _chips, _dispatch, _policy, _tuned
from ..linear.configs import Config, first_that_fills

# Multiply-adds an SM up to which the prologue serves. With tiles of 128 columns that is 62,500
# elements to normalise, 10 instructions each: 2.8 us on the 128 lanes of sm_90, half of it hidden
# behind another CTA's matmul. The launch that it saves takes 2 us. Chips of 8.x have half the lanes
# or a lower clock. Not yet measured.
LARGEST_PROLOGUE = {True: 8_000_000, False: 5_000_000}  # by `_chips.is_datacenter`


def _tile_config(m, n, k, warps, stages, tma=False, split=False):
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TMA": tma, "SPLIT": split,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


# The rule takes the first that gives every SM a tile, else the last. Several CTAs share an SM:
# one's normalisation runs beside another's matmul (3, 2, 4 and 4 on sm_90). Not listed: 128 x 128
# in 8 warps, whose 153 to 180 registers leave room for one, and spill where limited to 128.
HOPPER_CONFIGS = [
    _tile_config(64, 128, 64, 4, 3, tma=True, split=True),
    _tile_config(128, 64, 64, 8, 3, tma=True),
    _tile_config(64, 64, 64, 4, 3, tma=True),
    _tile_config(64, 32, 64, 4, 4, tma=True),
]
AMPERE_CONFIGS = [
    _tile_config(64, 128, 64, 4, 3, split=True),
    _tile_config(128, 64, 64, 8, 3),
    _tile_config(64, 64, 64, 4, 3),
    _tile_config(64, 32, 64, 4, 4),
]


def configs(capability: tuple[int, int]) -> list[Config]:
    """Every configuration of the prologue kernel that a tuned table may name.

    Args:
        capability: Compute capability of the chip.
    """
    return HOPPER_CONFIGS if _chips.is_datacenter(capability) else AMPERE_CONFIGS


@_tuned.validates("layer_norm_linear")
def why_not(shape: dict, choice: dict, capability: tuple[int, int]) -> str | None:
    """Why a tuned table may not name this choice for this shape; None where it may."""
    if choice.get("implementation") == "prologue":
        choice = choice | {"implementation": "triton"}
        return _tuned.check_choice(choice, ("triton",), configs(capability))
    return _tuned.check_choice(choice, ("fold", "separate", "prologue"), ())


def _lookup(x: Tensor, M: int, N: int, dtype: torch.dtype) -> dict | None:
    shape = {"M": M, "K": x.shape[-1], "N": N, "dtype": str(dtype)[6:]}
    return _tuned.lookup("layer_norm_linear", shape, _chips.chip(x.device))


def by_table(x: Tensor, weight: Tensor, rows: int, dtype: torch.dtype) -> str | None:
    """What a tuned table chose for the shape: "prologue", "fold" or "separate"; None: nothing.

    Args:
        x: (..., K).
        weight: (N, K).
        rows: Of x.
        dtype: Of the GEMM.
    """
    if torch.compiler.is_compiling():  # rows may be a symbol: of "separate" alone, for all of them
        return None if uses_row_stats(x, weight) else "separate"
    found = _lookup(x, rows, weight.shape[0], dtype)
    return None if found is None else str(found["implementation"])


def choose(x: Tensor, N: int) -> Config:
    """The prologue kernel's configuration by tuned table, otherwise by rule.

    Args:
        x: (M, K).
        N: Output features.
    """
    M = x.shape[0]
    found = _lookup(x, M, N, x.dtype)
    if found is not None and found["implementation"] == "prologue":
        return {k: v for k, v in found.items() if k != "implementation"}
    chip = _chips.chip(x.device)
    wide, *narrower = configs(chip.capability)
    candidates = [wide, *narrower] if N % wide["BLOCK_N"] == 0 else narrower
    return first_that_fills(candidates, M, N, chip.num_sms) or narrower[-1]


def is_small(x: Tensor, rows: int, weight: Tensor) -> bool:
    """Whether normalising in the prologue is likely to take less time than a launch.

    Each tile of y normalises its rows of x again, so that costs in proportion to M N K. In a
    program that is exported for any number of rows it is False.

    Args:
        x: (..., K).
        rows: M.
        weight: (N, K).
    """
    chip, (N, K) = _chips.chip(x.device), weight.shape
    most = LARGEST_PROLOGUE[_chips.is_datacenter(chip.capability)] * chip.num_sms
    return _dispatch.at_most(rows, most // (N * K))


def uses_row_stats(x: Tensor, weight: Tensor) -> bool:
    """Whether neither a tuned table nor an exclusion rules out folding LayerNorm into `weight`.

    Args:
        x: Rows of the dtype and device that would be folded.
        weight: (N, K).
    """
    if "layer_norm_linear" in _policy.excluded():
        return False
    N, K = weight.shape
    dtype = _checks.autocast_dtype(x) or x.dtype
    return _tuned.implementation("layer_norm_linear", weight, x, dtype, K=K, N=N) != "separate"
