"""LayerNorm and a GEMM: LayerNorm in its prologue, folded into it, or apart."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.kernels import (
    layer_norm_linear,
    layer_norm_linear_reference,
    linear,
    linear_reference,
)
from deit_fast.kernels._chips import Chip
from deit_fast.kernels.layer_norm_linear.configs import configs
from deit_fast.kernels.linear.configs import epilogue_name

from ..task import Task, choices, dtype_name, items, random_like, row_stats_of
from .linear import candidates, gemm_shape


def tasks(args: Sequence[Any], chip: Chip) -> Iterator[Task]:
    """The tasks of a recorded call of `layer_norm_linear`, by either of its operators.

    They are the GEMM that LayerNorm is folded into, the one that it is not folded into, and then
    the best of both against the kernel that normalises in its prologue.
    """
    x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation = args
    (M, K), N = x.shape, weight.shape[0]

    def make(device: torch.device) -> dict[str, Any]:
        made = {
            "x": random_like(x, device), "norm_weight": random_like(norm_weight, device),
            "norm_bias": random_like(norm_bias, device),
            "weight": random_like(weight, device, K**-0.5), "bias": random_like(bias, device),
            "eps": eps, "activation": activation,
        }  # fmt: skip
        if row_stats is not None:
            made["row_stats"] = row_stats_of(made["x"], row_stats.shape[0])
        return made

    def reference(row_stats: Tensor | None = None, **inputs: Any) -> Tensor:
        return layer_norm_linear_reference(**inputs)

    def folded(**inputs: Any) -> Any:
        return layer_norm_linear(**inputs, implementation="fold")

    # the folded epilogue always has a bias: LayerNorm's
    shape = gemm_shape(M, K, N, x.dtype, epilogue_name(activation, True, False, False, True, False))
    compared = candidates(x.dtype, chip, cublas=False)
    yield Task("linear", items(shape), compared, make, folded, reference)

    def gemm(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, **_: Any) -> Any:
        return linear(x, weight, bias, activation)

    def gemm_reference(
        x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, **_: Any
    ) -> Tensor:
        return linear_reference(x, weight, bias, activation)

    epilogue = epilogue_name(activation, bias is not None, False, False, False, False)
    shape = gemm_shape(M, K, N, x.dtype, epilogue)
    compared = candidates(x.dtype, chip, cublas=True)
    yield Task("linear", items(shape), compared, make, gemm, gemm_reference)

    shape = {"M": M, "K": K, "N": N, "dtype": dtype_name(x.dtype)}
    compared = choices("fold", [{}]) + choices("separate", [{}])
    compared += choices("prologue", configs(chip.capability))
    yield Task("layer_norm_linear", items(shape), compared, make, layer_norm_linear, reference)
