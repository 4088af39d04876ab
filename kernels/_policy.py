"""Which implementation serves an operation on a chip, and why.

`resolve(op, x, implementation)` turns the caller's choice into the name of an implementation:

    "auto"    what `choose` says for the tensor's device and dtype (CPU: always "torch")
    "triton"  the Triton kernel; raises where it cannot run
    "cublas"  `linear` only: cuBLAS followed by one fused elementwise kernel
    "torch"   the plain PyTorch reference

`deit_fast.kernels.explain` lists what was resolved in a call.
"""

import os
from typing import NamedTuple

import torch

from . import _chips, _dispatch, _explain, _plan_library
from ._checks import DTYPES, FORMAT_NAMES, autocast_dtype

MATMUL_OPS = (  # these need tensor cores
    "linear",
    "patch_embed",
    "classifier",
    "attention",
    "talking_heads",
    "window_attention",
)
ROW_OPS = (  # memory-bound: a row, or a few neighbouring pixels, at a time
    "layer_norm",
    "add_layer_norm",
    "distillation_loss",
    "sparse_cross_entropy",
    "conv_norm",
    "quantize",
)
# what `exclude` and DEIT_FAST_EXCLUDE take: operations, folding LayerNorm, a quantized format
EXCLUDABLE = (*MATMUL_OPS, *ROW_OPS, "layer_norm_linear", *FORMAT_NAMES.values())
_excluded: frozenset[str] = frozenset()


def exclude(*names: str) -> None:
    """Leave these operations to PyTorch in this process, under "auto".

    For a machine on which a kernel is wrong. A call replaces what an earlier one named. The
    environment variable DEIT_FAST_EXCLUDE, names with commas between them, does the same. Nothing
    replaces a quantized format: using an excluded one raises RuntimeError.

    Args:
        *names: Some of `EXCLUDABLE`; none ends the exclusion.

    Raises:
        ValueError: For unknown names.
    """
    unknown = [name for name in names if name not in EXCLUDABLE]
    if unknown:
        raise ValueError(f"exclude: unknown {', '.join(unknown)}, expected some of {EXCLUDABLE}")
    global _excluded
    _excluded = frozenset(names)
    _plan_library.changed()


def excluded() -> frozenset[str]:
    """What `exclude` named last."""
    return _excluded


exclude(*filter(None, os.environ.get("DEIT_FAST_EXCLUDE", "").replace(" ", "").split(",")))


class Choice(NamedTuple):
    """An implementation, and why it serves."""

    implementation: str
    reason: str


EXCLUDED = "excluded: see deit_fast.kernels.exclude"
_NO_TENSOR_CORES = "Triton uses no tensor cores below compute capability 8.0"
_FP32 = "fp32 matmuls run on the FMA units in Triton"

_CPU = Choice("torch", "no CUDA device: plain PyTorch")
_OLD = Choice("torch", "Triton needs compute capability 7.0")
_OTHER_DTYPE = Choice("torch", "the kernels compute in fp32: fp32, fp16 and bf16 only")
_EXCLUDED = Choice("torch", EXCLUDED)
_TRANSFORMED = Choice(
    "torch", "torch.func and forward-mode differentiation know PyTorch's operations only"
)
_ROWS = Choice("triton", "memory-bound: one kernel over the tensor instead of several")
_FUSED = Choice("triton", "tensor cores, prologue and epilogue fused; not yet measured")
_QUANTIZED = Choice("triton", "quantized operands, prologue and epilogue fused")
_WITHOUT_TENSOR_CORES = {
    "linear": ("cublas", "; cuBLAS with bias, GELU and residual in one Triton kernel"),
    "attention": ("torch", "; PyTorch's scaled_dot_product_attention"),
    "window_attention": ("torch", "; PyTorch's scaled_dot_product_attention"),
    "patch_embed": ("torch", "; PyTorch's convolution"),
    "classifier": ("torch", "; cuBLAS"),
    "talking_heads": ("torch", "; PyTorch's matmuls and softmax"),
}


def choose(op: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> Choice:
    """The implementation that serves `op` on a chip, and why; pure, so printable.

    Compute capability 10.x has the rules of 9.0, and 12.x those of 8.x, until something else is
    measured: see `_chips.is_datacenter`.

    Args:
        op: One of `MATMUL_OPS` or `ROW_OPS`, or a quantized operation.
        capability: Of the chip; None is a CPU.
        dtype: Of the operands. A quantized one without a kernel gives the implementation "none".
    """
    if dtype in _chips.QUANTIZED_FORMATS and capability is not None:
        least, reason = _chips.QUANTIZED_FORMATS[dtype]
        if FORMAT_NAMES[dtype] in _excluded:
            return Choice("none", f"{FORMAT_NAMES[dtype]} is excluded")
        return _QUANTIZED if capability >= least else Choice("none", reason)
    if capability is None:
        return _CPU
    if capability < (7, 0):
        return _OLD
    if op in _excluded:
        return _EXCLUDED
    if dtype not in DTYPES:
        return _OTHER_DTYPE
    if op in ROW_OPS:
        return _ROWS
    for applies, reason in (
        (capability < (8, 0), _NO_TENSOR_CORES),
        (dtype == torch.float32, _FP32),
    ):
        if applies:
            implementation, instead = _WITHOUT_TENSOR_CORES[op]
            return Choice(implementation, reason + instead)
    return _FUSED


def resolve(
    op: str, x: torch.Tensor, implementation: str, allowed: tuple[str, ...] = ("triton", "torch"),
    dtype: torch.dtype | None = None, *, record: bool = True,
) -> str:  # fmt: skip
    """The implementation that will run `op` on `x`.

    Args:
        op: As `choose`'s.
        x: The operation's first operand.
        implementation: What the caller asked for.
        allowed: What may be asked for besides "auto".
        dtype: The quantized dtype that is read or written, if any.
        record: Whether `deit_fast.kernels.explain` lists it; False for a question that no call of
            `op` on `x` follows.

    Raises:
        ValueError: For an unknown implementation.
        RuntimeError: For a Triton kernel where it cannot run: nothing replaces a quantized one.
        TypeError: For a dtype that the kernels do not take.
    """
    if implementation == "torch":
        if record and _explain.decisions is not None:
            _explain.record(op, "torch", _explain.ASKED)
        return "torch"
    on = _chips.capability(x.device.type, x.device.index)
    if dtype is not None and on is not None:
        quantized = choose(op, on, dtype)
        if quantized.implementation == "none":
            raise RuntimeError(f"{op}: {quantized.reason}, x is on a chip of {on[0]}.{on[1]}")
    choice = under_autocast = None
    if implementation == "auto":
        if dtype is None and op in MATMUL_OPS:
            under_autocast = autocast_dtype(x)
        choice = choose(op, on, dtype or under_autocast or x.dtype)
        implementation = choice.implementation
    else:
        if implementation not in allowed:
            names = ", ".join(repr(name) for name in ("auto", *allowed))
            raise ValueError(
                f"implementation: {implementation!r} for {op}, expected one of {names}"
            )
        if not (x.is_cuda or x.is_meta or _chips.INTERPRET or _chips.is_simulated()):
            raise RuntimeError(
                f"implementation {implementation!r} of {op} needs a CUDA tensor, x is on "
                f"{x.device}; use 'torch' or 'auto' there"
            )
        if x.dtype not in DTYPES and x.dtype not in (torch.uint8, dtype):
            raise TypeError(f"{op}: dtype {x.dtype}, expected float32, float16 or bfloat16")
    if implementation != "torch" and _dispatch.is_transformed():
        if dtype is not None:
            raise RuntimeError(f"{op}: quantized under torch.func, expected implementation='torch'")
        _dispatch.warn_of_transforms()
        implementation, choice = "torch", _TRANSFORMED
    if record and _explain.decisions is not None:
        reason = _explain.ASKED if choice is None else choice.reason
        if under_autocast is not None:
            reason = f"{reason}; autocast to {str(under_autocast)[6:]}"
        _explain.record(op, implementation, reason)
    return implementation
