"""The GEMM with its epilogue, cuBLAS among the candidates; and the backward GEMM before GELU."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.kernels import linear, linear_reference
from deit_fast.kernels._chips import Chip
from deit_fast.kernels.linear import linear_gelu_backward
from deit_fast.kernels.linear.configs import ROW_STATS_WIDTH, configs, epilogue_name

from ..task import Choice, Task, choices, dtype_name, items, random_like


def candidates(
    dtype: torch.dtype, chip: Chip, cublas: bool, narrow: bool = True, backward: bool = False
) -> tuple[Choice, ...]:
    """Triton's configurations of a GEMM, after cuBLAS.

    Args:
        dtype: Of the operands.
        chip: That they are for.
        cublas: Whether cuBLAS computes the same.
        narrow: Also tiles that are too narrow to emit row statistics.
        backward: Those of the GEMM before GELU's backward.
    """
    tiles = [
        config
        for config in configs(dtype, chip.capability, backward)
        if narrow or config["BLOCK_N"] >= ROW_STATS_WIDTH
    ]
    return (choices("cublas", [{}]) if cublas else ()) + choices("triton", tiles)


def gemm_shape(M: int, K: int, N: int, dtype: torch.dtype, epilogue: str) -> dict[str, Any]:
    """The shape under which the table has a GEMM."""
    return {"M": M, "K": K, "N": N, "dtype": dtype_name(dtype), "epilogue": epilogue}


def tasks(args: Sequence[Any], chip: Chip) -> Iterator[Task]:
    """The task of a recorded call of `linear`."""
    x, weight, bias, residual, layer_scale, row_scale, activation, emit, *_ = args
    (M, K), N = x.shape, weight.shape[0]
    scaled = layer_scale is not None or row_scale is not None
    epilogue = epilogue_name(
        activation, bias is not None, residual is not None, scaled, False, emit
    )
    shape = gemm_shape(M, K, N, x.dtype, epilogue)

    def make(device: torch.device) -> dict[str, Any]:
        return {
            "x": random_like(x, device), "weight": random_like(weight, device, K**-0.5),
            "bias": random_like(bias, device), "activation": activation,
            "residual": random_like(residual, device),
            "layer_scale": random_like(layer_scale, device),
            "row_scale": random_like(row_scale, device),
        }  # fmt: skip

    def call(**inputs: Any) -> Any:
        return linear(**inputs, return_row_stats=emit)

    compared = candidates(x.dtype, chip, cublas=True, narrow=not emit)
    yield Task("linear", items(shape), compared, make, call, linear_reference)


def gelu_backward_tasks(
    calls: Sequence[tuple[str, Sequence[Any], Any]], chip: Chip
) -> Iterator[Task]:
    """The GEMM that brings fc2's gradient behind GELU, for each MLP among the recorded calls."""
    for (name, fc1, made), (after, fc2, _) in zip(calls, calls[1:], strict=False):
        fused = ("layer_norm_linear", "layer_norm_linear_prologue")
        if name not in ("linear", *fused) or after != "linear":
            continue
        if "gelu" not in [argument for argument in fc1 if isinstance(argument, str)]:
            continue
        hidden, weight = made[0] if name == "linear" else made, fc2[1]
        if fc2[0].shape == hidden.shape:
            yield _gelu_backward_task(fc1[0], weight, hidden, chip)


def _gelu_backward_task(x: Tensor, fc2_weight: Tensor, hidden: Tensor, chip: Chip) -> Task:
    """The upstream gradient has the shape of fc1's x."""
    (M, N), K = hidden.shape, fc2_weight.shape[0]
    shape = gemm_shape(M, K, N, hidden.dtype, "gelu_backward")

    def make(device: torch.device) -> dict[str, Any]:
        return {
            "dy": random_like(x, device), "weight": random_like(fc2_weight, device, K**-0.5),
            "z": random_like(hidden, device),
        }  # fmt: skip

    def call(dy: Tensor, weight: Tensor, z: Tensor) -> Tensor:
        return linear_gelu_backward(dy, weight, z, "auto")[0]

    def reference(dy: Tensor, weight: Tensor, z: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(dy @ weight, z)

    compared = candidates(hidden.dtype, chip, cublas=True, backward=True)
    return Task("linear", items(shape), compared, make, call, reference)
