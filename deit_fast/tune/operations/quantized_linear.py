"""The GEMM with quantized operands: Triton's configurations."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deit_fast.kernels import quantize_reference, quantized_linear, quantized_linear_reference
from deit_fast.kernels._chips import Chip
from deit_fast.kernels.quantize import quantize_statically_reference
from deit_fast.kernels.quantized_linear.configs import configs, lookup_shape, why_not

from ..task import Task, choices, items, random_like

SCALE = 0.02  # a per-tensor e4m3 scale for normal values: 9 at most


def tasks(args: Sequence[Any], chip: Chip) -> Iterator[Task]:
    """The task of a recorded call of `quantized_linear`."""
    (
        x, x_scales, weight, _, bias, residual, layer_scale, row_scale, out_scale, activation, dtype
    ) = args  # fmt: skip
    shape = lookup_shape(*args)
    format, per_tensor = str(shape["dtype"]), x_scales.numel() == 1

    def make(device: torch.device) -> dict[str, Any]:
        rows = torch.randn(x.shape, device=device)
        scale = torch.full((1, 1), SCALE, device=device)
        weights = torch.randn(weight.shape, device=device) * weight.shape[1] ** -0.5
        made = {
            "x": quantize_statically_reference(rows, scale) if per_tensor and format == "fp8"
            else quantize_reference(rows, format, len(x_scales)),
            "weight": quantize_reference(weights, format), "bias": random_like(bias, device),
            "activation": activation, "residual": random_like(residual, device),
            "layer_scale": random_like(layer_scale, device),
            "row_scale": random_like(row_scale, device),
        }  # fmt: skip
        if dtype.itemsize > 1:
            return made | {"dtype": dtype}
        return made | {"format": format, "out_scale": None if out_scale is None else scale}

    def exact(dtype: Any = None, format: Any = None, out_scale: Any = None, **inputs: Any) -> Any:
        return quantized_linear_reference(**inputs, dtype=torch.float32)

    compared = tuple(
        choice
        for choice in choices("triton", configs(chip.capability))
        if not why_not(shape, dict(choice), chip.capability)
    )
    yield Task(
        "quantized_linear", items(shape), compared, make, quantized_linear,
        quantized_linear_reference, exact,
    )  # fmt: skip
