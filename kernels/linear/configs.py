"""Tiles of the GEMM kernel, the reasons for them, and which one serves a shape."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _checks, _chips, _dispatch, _policy, _tuned

Config = dict[str, int]  # constexprs (flags are bools), num_warps and num_stages

# 8 elements a thread and step. 128 rows a program: the partial sums are 1/64 of dy's bytes (bf16).
BACKWARD_META = {"ROWS": 128, "BLOCK_M": 8, "BLOCK_N": 128, "num_warps": 4}
EPILOGUE_META = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}  # 8 elements (16 bytes) a thread
ROW_STATS_WIDTH = 64  # columns of y that one pair of row statistics summarises


def tile_config(
    m: int, n: int, k: int, warps: int, stages: int, tma: bool = False, persistent: bool = False,
    split: bool = False,
) -> Config:  # fmt: skip
    """A configuration of the GEMM kernel.

    Args:
        m: Rows of a tile of y.
        n: Columns of it.
        k: Features that one step of the loop over K takes.
        warps: Of a CTA.
        stages: Of the software pipeline.
        tma: Load the operands by tensor descriptors (TMA).
        persistent: Launch one program an SM, each of which loops over tiles.
        split: Run the epilogue on half the columns at a time.
    """
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TMA": tma, "PERSISTENT": persistent,
        "SPLIT": split, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


FP32_CONFIG = tile_config(64, 64, 16, 8, 2)  # FMA units: registers hold the operands too
# For "gelu_backward" on sm_90; see backward_config.
BACKWARD_CONFIG = tile_config(64, 128, 64, 4, 3, tma=True, split=True)
# One CTA an SM; only a tuned table chooses it.
WIDE_BACKWARD_CONFIG = tile_config(128, 256, 64, 8, 4, tma=True, split=True)
# What each chip may be served with. The first three are the rule's, in its order. None of them
# spills registers or serialises its matrix instructions with any epilogue:
# tests/benchmarks/test_ahead_of_time.py. Not listed, with the compiler's figures in
# docs/performance.md: 128 x 256 without a split epilogue (Triton 3.6's ptxas serialises the matrix
# instructions) and warp specialisation (Triton 3.9 refuses host descriptors).
HOPPER_CONFIGS = [
    # Two CTAs an SM: the epilogue of one overlaps the matmul of the other.
    tile_config(128, 128, 64, 8, 3, tma=True, split=True),
    # For N = 192 and similar, where 128 columns would leave half of the last tile idle. Three CTAs.
    tile_config(128, 64, 64, 4, 3, tma=True),
    tile_config(64, 32, 64, 4, 4),  # few rows
    tile_config(128, 256, 64, 8, 3, tma=True, split=True),
    tile_config(128, 128, 64, 8, 3, tma=True, persistent=True, split=True),
    tile_config(128, 256, 64, 8, 3, tma=True, persistent=True, split=True),
    BACKWARD_CONFIG,
    tile_config(128, 128, 64, 8, 3, split=True),
    tile_config(128, 64, 64, 4, 3),
]
AMPERE_CONFIGS = [
    tile_config(64, 128, 64, 4, 3, split=True),
    tile_config(128, 64, 64, 4, 3),
    tile_config(64, 32, 64, 4, 4),
    tile_config(128, 128, 32, 8, 4, split=True),
]


def backward_config(config: Config) -> Config:
    """The configuration that "gelu_backward" uses in place of a forward one.

    Its epilogue holds twice as much, so it is always split. On sm_90, 8 warps whose registers are
    limited to let two CTAs share an SM would spill, except with pointer loads. So TMA tiles of 8
    warps become tiles of half the rows in 4 warps, three CTAs an SM.
    """
    if config["TMA"] and config["num_warps"] == 8:
        return BACKWARD_CONFIG
    config = config | {"SPLIT": config["BLOCK_N"] >= 64}
    if config["BLOCK_N"] == 128 and config["BLOCK_K"] == 64 and config["num_warps"] == 8:
        config["maxnreg"] = 128
    return config


def configs(
    dtype: torch.dtype, capability: tuple[int, int], backward: bool = False
) -> list[Config]:
    """Every configuration of the Triton kernel that a tuned table may name.

    Args:
        dtype: Of the operands.
        capability: Compute capability of the chip.
        backward: List those of "gelu_backward" instead.
    """
    if dtype == torch.float32:
        return [FP32_CONFIG]
    hopper = _chips.is_datacenter(capability)
    found = HOPPER_CONFIGS if hopper else AMPERE_CONFIGS
    if not backward:
        return found
    wide = [WIDE_BACKWARD_CONFIG] if hopper else []
    found = [backward_config(config) for config in found] + wide
    return [config for i, config in enumerate(found) if config not in found[:i]]


@_tuned.validates("linear")
def why_not(shape: dict, choice: dict, capability: tuple[int, int]) -> str | None:
    """Why a tuned table may not name this choice for this shape; None where it may."""
    dtype = getattr(torch, str(shape.get("dtype")), None)
    if dtype not in _checks.DTYPES:
        return f"dtype {shape.get('dtype')!r}"
    epilogue = str(shape.get("epilogue"))
    if choice.get("implementation") == "cublas" and "folded" in epilogue:
        return "cuBLAS rounds the matmul's result before LayerNorm's mean is subtracted"
    if "row_stats" in epilogue and choice.get("BLOCK_N", 64) < ROW_STATS_WIDTH:
        return f"a tile narrower than the {ROW_STATS_WIDTH} columns of row statistics"
    offered = configs(dtype, capability, epilogue == "gelu_backward")
    return _tuned.check_choice(choice, ("triton", "cublas"), offered)


def meta(
    M: int, N: int, dtype: torch.dtype, capability: tuple[int, int], num_sms: int,
    row_stats: bool = False,
) -> Config:  # fmt: skip
    """The configuration by rule, for a shape that no tuned table lists.

    It is the first of the chip's three that leaves no tile half empty and gives every SM a tile.

    Args:
        M: Rows.
        N: Output features.
        dtype: Of the operands.
        capability: Compute capability of the chip.
        num_sms: SMs of the chip.
        row_stats: Whether the epilogue writes row statistics, 64 columns at a time.
    """
    if dtype == torch.float32:
        return FP32_CONFIG
    wide, narrow, small = configs(dtype, capability)[:3]
    candidates = (wide, narrow) if N % wide["BLOCK_N"] == 0 else (narrow,)
    return first_that_fills(candidates, M, N, num_sms) or (narrow if row_stats else small)


def first_that_fills(candidates: Iterable[Config], M: int, N: int, num_sms: int) -> Config | None:
    """The first configuration that gives every SM a tile of y (M, N); None if there is none."""
    for config in candidates:
        if _dispatch.cdiv(M, config["BLOCK_M"]) * _dispatch.cdiv(N, config["BLOCK_N"]) >= num_sms:
            return config
    return None


def epilogue_name(
    activation: str, bias: bool, residual: bool, scaled: bool, normalised: bool, row_stats: bool
) -> str:
    """The epilogue as tuned tables write it, for example "folded+bias+gelu"."""
    parts = {
        "folded": normalised, "bias": bias, activation: activation != "none",
        "scales": scaled, "residual": residual, "row_stats": row_stats,
    }  # fmt: skip
    return "+".join(name for name, present in parts.items() if present)


def choose(
    x: Tensor, N: int, epilogue: str, row_stats: bool, implementation: str
) -> tuple[str, Config]:
    """The implementation and configuration by tuned table, otherwise by rule.

    Args:
        x: (M, K).
        N: Output features.
        epilogue: As `epilogue_name` writes it.
        row_stats: Whether the epilogue writes row statistics.
        implementation: "auto", "triton" or "cublas".

    Returns:
        "cublas" or "triton", and the configuration of the Triton kernel.
    """
    (M, K), dtype = x.shape, x.dtype
    chip = _chips.chip(x.device)
    shape = {"M": M, "K": K, "N": N, "dtype": str(dtype)[6:], "epilogue": epilogue}
    found = _tuned.lookup("linear", shape, chip)
    if found is not None and implementation in ("auto", found["implementation"]):
        config = {k: v for k, v in found.items() if k != "implementation"}
        return found["implementation"], config
    if implementation == "auto":
        implementation = _policy.choose("linear", chip.capability, dtype).implementation
    config = meta(M, N, dtype, chip.capability, chip.num_sms, row_stats)
    return implementation, backward_config(config) if epilogue == "gelu_backward" else config


def without_tma(config: Config, listed: list[Config]) -> Config:
    """The listed configuration of the same width that loads by pointers, if `config` uses TMA."""
    if not config["TMA"]:
        return config
    width = min(config["BLOCK_N"], 128)
    return next(c for c in listed if not c["TMA"] and c["BLOCK_N"] == width)


def tma_can_address(x: Tensor, weight: Tensor) -> bool:
    """Whether tensor descriptors can address x (M, K) and weight (N, K).

    Their rows and first elements must lie at multiples of 16 bytes.
    """
    if x.shape[1] * x.element_size() % 16:
        return False
    return all(t.data_ptr() % 16 == 0 for t in (x, weight))
