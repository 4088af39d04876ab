"""Tiles of the fused kernel, and when it serves."""

from torch import Tensor

from .. import _chips, _tuned
from ..linear.configs import Config


def _tile_config(m, h, warps, stages):
    return {"BLOCK_M": m, "BLOCK_H": h, "num_warps": warps, "num_stages": stages}


# D -> the two powers of two that it is split into. D = 384 takes more than the registers of one CTA
# and reads its weights too often to gain.
FUSED_D = {192: (128, 64)}
HOPPER_CONFIGS = [
    _tile_config(64, 32, 4, 3),
    _tile_config(64, 32, 4, 2),
    _tile_config(128, 32, 8, 2),
]
AMPERE_CONFIGS = [_tile_config(64, 32, 8, 2)]


def configs(capability: tuple[int, int]) -> list[Config]:
    """Every configuration of the fused kernel that a tuned table may name; the first is the rule's.

    Args:
        capability: Compute capability of the chip.
    """
    return HOPPER_CONFIGS if _chips.is_datacenter(capability) else AMPERE_CONFIGS


@_tuned.validates("layer_norm_mlp")
def why_not(shape: dict, choice: dict, capability: tuple[int, int]) -> str | None:
    """Why a tuned table may not name this choice for this shape; None where it may."""
    if choice.get("implementation") == "fused":
        if shape.get("D") not in FUSED_D or shape.get("dtype") not in ("float16", "bfloat16"):
            return f"fused for {shape}, expected D in {list(FUSED_D)} and half precision"
        choice = choice | {"implementation": "triton"}
        return _tuned.check_choice(choice, ("triton",), configs(capability))
    return _tuned.check_choice(choice, ("parts",), ())


def choose(x: Tensor, hidden: int) -> Config:
    """The fused kernel's configuration by tuned table, otherwise by rule.

    Args:
        x: (M, D).
        hidden: Features of the hidden layer.
    """
    M, D = x.shape
    chip = _chips.chip(x.device)
    shape = {"M": M, "D": D, "hidden": hidden, "dtype": str(x.dtype)[6:]}
    found = _tuned.lookup("layer_norm_mlp", shape, chip) or {}
    config = {k: v for k, v in found.items() if k != "implementation"}
    return config or configs(chip.capability)[0]


def is_fused_by_table(x: Tensor, fc2_weight: Tensor) -> bool:
    """Whether a tuned table names the fused kernel for x (..., D) and fc2_weight (D, hidden)."""
    D, hidden = fc2_weight.shape
    found = _tuned.implementation("layer_norm_mlp", fc2_weight, x, x.dtype, D=D, hidden=hidden)
    return found == "fused"
