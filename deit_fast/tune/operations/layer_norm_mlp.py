"""The MLP after LayerNorm: one fused kernel, or its parts."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.kernels import layer_norm_mlp, layer_norm_mlp_reference
from deit_fast.kernels._chips import Chip
from deit_fast.kernels.layer_norm_mlp.configs import FUSED_D, configs

from ..task import Task, choices, dtype_name, items, random_like, row_stats_of

_WEIGHTS = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def tasks(calls: Sequence[tuple[str, Sequence[Any], Any]], chip: Chip) -> Iterator[Task]:
    """A task for each fc1 and the fc2 after it, among recorded calls, that one kernel can do."""
    for (name, args, hidden), (after, rest, _) in zip(calls, calls[1:], strict=False):
        if name not in ("layer_norm_linear", "layer_norm_linear_prologue") or after != "linear":
            continue
        if rest[0].shape != hidden.shape:
            continue
        x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation = args
        _, weight2, bias2, residual, layer_scale, row_scale, _, emit, *_ = rest
        D = x.shape[1]
        scaled = layer_scale is not None or row_scale is not None
        fits = D in FUSED_D and weight2.shape[0] == D and weight.shape[0] % 32 == 0
        if activation == "gelu" and fits and not scaled:
            weights = (norm_weight, norm_bias, weight, bias, weight2, bias2)
            yield _task(x, weights, residual, row_stats, eps, emit, chip)


def _task(
    x: Tensor, weights: Sequence[Tensor | None], residual: Tensor | None, row_stats: Tensor | None,
    eps: float, emit: bool, chip: Chip,
) -> Task:  # fmt: skip
    fc1_weight = weights[_WEIGHTS.index("fc1_weight")]
    assert fc1_weight is not None
    hidden, D = fc1_weight.shape
    shape = {"M": x.shape[0], "D": D, "hidden": hidden, "dtype": dtype_name(x.dtype)}

    def make(device: torch.device) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, like in zip(_WEIGHTS, weights, strict=True):
            scale = 1.0 if like is None or like.dim() == 1 else like.shape[1] ** -0.5
            made[name] = random_like(like, device, scale)
        made["x"] = random_like(x, device)
        if row_stats is not None:
            made["row_stats"] = row_stats_of(made["x"], row_stats.shape[0])
        return made | {"residual": random_like(residual, device), "eps": eps}

    def call(**inputs: Any) -> Any:
        return layer_norm_mlp(**inputs, return_row_stats=emit)

    def reference(row_stats: Tensor | None = None, **inputs: Any) -> Tensor:
        return layer_norm_mlp_reference(**inputs)

    compared = choices("parts", [{}]) + choices("fused", configs(chip.capability))
    return Task("layer_norm_mlp", items(shape), compared, make, call, reference)
