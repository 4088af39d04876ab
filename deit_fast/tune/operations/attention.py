"""Attention: SDPA, and Triton's configurations."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deit_fast.kernels import attention, attention_reference
from deit_fast.kernels._chips import Chip
from deit_fast.kernels.attention.configs import configs

from ..task import Task, choices, dtype_name, items, random_like


def tasks(args: Sequence[Any], chip: Chip) -> Iterator[Task]:
    """The task of a recorded call of `attention`."""
    q, k, v, bias, scale, *_ = args
    B, N, H, d = q.shape
    L = k.shape[1]
    shape = {
        "M": B * H, "N": N, "L": L, "d": d, "dtype": dtype_name(q.dtype), "bias": bias is not None,
    }  # fmt: skip

    def make(device: torch.device) -> dict[str, Any]:
        packed = torch.randn(B, L, 3, H, d, device=device).to(q.dtype)
        queries, keys, values = packed.unbind(2)
        return {
            "q": queries[:, :N], "k": keys, "v": values, "scale": scale,
            "bias": random_like(bias, device),
        }  # fmt: skip

    tiles = configs(q.dtype, N, L, d, bias is not None)
    compared = choices("torch", [{}]) + choices("triton", tiles)
    yield Task("attention", items(shape), compared, make, attention, attention_reference)


def quantized_tasks(args: Sequence[Any], chip: Chip) -> Iterator[Task]:
    """The task of a recorded call of `attention_quantized` with operands in half precision.

    The table has it as `attention`: rounding the result to a quantized format changes little. With
    quantized operands there is one configuration alone, so nothing is compared.
    """
    q, k, v, scale, *_ = args
    if q.element_size() > 1:
        yield from tasks((q, k, v, None, scale), chip)
