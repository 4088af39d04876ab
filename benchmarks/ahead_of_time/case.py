"""`Case`: one kernel in one configuration, and short ways to write its signature."""

from dataclasses import dataclass, field

import torch

from .dtypes import TRITON_TYPE


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel in one configuration, with the work of one DeiT call at batch 256.

    Attributes:
        op: Name of the operation in `deit_fast.kernels`.
        label: What tells the case from the operation's others.
        kernel: Name of the `triton.jit` function.
        arch: Compute capability, 90 for 9.0.
        signature: Argument -> dtype of a pointer, (dtype, *block) of a tensor descriptor, "i32" or
            "fp32" of a scalar. A pointer of None is an optional argument left out.
        constexprs: Argument -> value known at compile time.
        meta: Block sizes, num_warps, num_stages.
        bytes: Bytes that must move, each once.
        flops: Floating-point operations of the matmuls.
        asynchronous: Whether the matmuls must overlap the loads of their operands.
    """

    op: str
    label: str
    kernel: str
    arch: int
    signature: dict
    meta: dict
    bytes: int
    constexprs: dict = field(default_factory=dict)
    flops: int = 0
    asynchronous: bool = False


def capability(arch: int) -> tuple[int, int]:
    """(9, 0) for 90."""
    return arch // 10, arch % 10


def pointers(names: str, dtype: torch.dtype | None) -> dict:
    """Pointer arguments to one dtype; names are separated by spaces."""
    return dict.fromkeys(names.split(), dtype)


def integers(names: str) -> dict:
    """int32 arguments."""
    return dict.fromkeys(names.split(), "i32")


def floats(names: str) -> dict:
    """fp32 arguments."""
    return dict.fromkeys(names.split(), "fp32")


def type_names(*dtypes: torch.dtype) -> str:
    """ "bf16", or "fp32 and bf16" of two that differ."""
    return " and ".join(dict.fromkeys(TRITON_TYPE[dtype] for dtype in dtypes))


def tile_name(config: dict) -> str:
    """The tile of a GEMM configuration: "128x256x64 w8 s3 tma persistent"."""
    sizes = "x".join(str(config[f"BLOCK_{d}"]) for d in "MNK")
    kinds = [kind.lower() for kind in ("TMA", "PERSISTENT", "SPLIT") if config.get(kind)]
    return " ".join((sizes, f"w{config['num_warps']}", f"s{config['num_stages']}", *kinds))
