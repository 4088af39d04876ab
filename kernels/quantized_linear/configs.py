"""Tiles of the quantized GEMM kernel, the reasons for them, and which one serves a shape."""

import torch
from torch import Tensor

from .. import _chips, _tuned
from ..linear.configs import Config, first_that_fills, tile_config

GROUP_SIZE = 64  # columns of a result that share a scale


def _tile_config(m, n, k, warps, stages, tma=False, split=False):
    config = tile_config(m, n, k, warps, stages, tma=tma, split=split)
    return {name: value for name, value in config.items() if name != "PERSISTENT"}


# As linear's, with twice the features a step: as many bytes. The first three are the rule's, in its
# order: the first leaves room for two CTAs an SM, the second for three. Per-group scales of x are
# applied inside the loop over K and take registers for a second accumulator. Tiles wider than 64
# columns then spill (128 x 256 on sm_90, 64 x 128 on sm_80) or leave room for one CTA only.
HOPPER_CONFIGS = [
    _tile_config(128, 128, 128, 8, 3, tma=True, split=True),
    _tile_config(128, 64, 128, 4, 3, tma=True),
    _tile_config(64, 32, 128, 4, 4),  # few rows
    _tile_config(128, 256, 128, 8, 3, tma=True, split=True),
    _tile_config(128, 128, 128, 8, 3, split=True),
    _tile_config(128, 64, 128, 4, 3),
]
AMPERE_CONFIGS = [
    _tile_config(64, 128, 128, 4, 3, split=True),
    _tile_config(128, 64, 64, 4, 4),
    _tile_config(64, 32, 128, 4, 4),
]


def configs(capability: tuple[int, int]) -> list[Config]:
    """Every configuration that a tuned table may name.

    Args:
        capability: Compute capability of the chip.
    """
    return HOPPER_CONFIGS if _chips.is_datacenter(capability) else AMPERE_CONFIGS


def epilogue_name(
    groups: bool, activation: str, bias: bool, residual: bool, scaled: bool, own_scale: bool,
    quantized: bool,
) -> str:  # fmt: skip
    """The epilogue as tuned tables write it, for example "bias+gelu+quantized"."""
    present = {
        "parts": groups, "bias": bias, activation: activation != "none", "scales": scaled,
        "residual": residual, "quantized": quantized, "own_scales": own_scale,
    }  # fmt: skip
    return "+".join(name for name, there in present.items() if there)


@_tuned.validates("quantized_linear")
def why_not(shape: dict, choice: dict, capability: tuple[int, int]) -> str | None:
    """Why a tuned table may not name this choice for this shape; None where it may."""
    epilogue = str(shape.get("epilogue"))
    if "own_scales" in epilogue and choice.get("BLOCK_N", GROUP_SIZE) < GROUP_SIZE:
        return f"a tile narrower than the {GROUP_SIZE} columns that share a scale"
    if "parts" in epilogue and choice.get("BLOCK_N", GROUP_SIZE) > GROUP_SIZE:
        return (
            f"a tile wider than {GROUP_SIZE} columns with per-group scales of x: "
            "its second accumulator spills"
        )
    return _tuned.check_choice(choice, ("triton",), configs(capability))


def meta(
    M: int, N: int, capability: tuple[int, int], num_sms: int, groups: bool = False,
    own_scales: bool = False,
) -> Config:  # fmt: skip
    """The configuration by `linear`'s rule, for a shape that no tuned table lists.

    Args:
        M: Rows.
        N: Output features.
        capability: Compute capability of the chip.
        num_sms: SMs of the chip.
        groups: Whether x has per-group scales.
        own_scales: Whether the result gets per-group scales.
    """
    wide, narrow, small = configs(capability)[:3]
    wide_fits = N % wide["BLOCK_N"] == 0 and not groups
    candidates = (wide, narrow) if wide_fits else (narrow,)
    return first_that_fills(candidates, M, N, num_sms) or (narrow if own_scales else small)


def block_k(config: Config, width: int) -> int:
    """Features a step: the configuration's, or the power of two that divides a group of `width`."""
    return min(config["BLOCK_K"], width & -width)


def lookup_shape(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    residual: Tensor | None, layer_scale: Tensor | None, row_scale: Tensor | None,
    out_scale: Tensor | None, activation: str, dtype: torch.dtype,
) -> dict[str, int | str]:  # fmt: skip
    """The shape by which a tuned table is searched, from the operator's arguments."""
    quantized = dtype.itemsize == 1
    epilogue = epilogue_name(
        x_scales.shape[0] > 1, activation, bias is not None, residual is not None,
        layer_scale is not None or row_scale is not None, quantized and out_scale is None,
        quantized,
    )  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    format = "int8" if x.dtype == torch.int8 else "fp8"
    return {"M": M, "K": K, "N": N, "dtype": format, "epilogue": epilogue}


def choose(shape: dict, device: torch.device, groups: bool, own_scales: bool) -> Config:
    """The configuration by tuned table, otherwise by rule.

    Args:
        shape: As `lookup_shape` gives it.
        device: Of the operands.
        groups: Whether x has per-group scales.
        own_scales: Whether the result gets per-group scales.
    """
    chip = _chips.chip(device)
    found = _tuned.lookup("quantized_linear", shape, chip)
    if found is not None:
        return {k: v for k, v in found.items() if k != "implementation"}
    return meta(shape["M"], shape["N"], chip.capability, chip.num_sms, groups, own_scales)
