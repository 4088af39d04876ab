"""An operation as its benchmark file describes it, and how a result is compared.

What is called, its reference, its inputs: `benchmarks/bench_<op>.py` is the only place that says
so.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deit_fast.bench.correctness import Mismatch
from deit_fast.bench.modes import PRECISIONS
from deit_fast.kernels import Quantized, dequantize
from deit_fast.kernels.quantize import FORMATS
from deit_fast.tune import allowance

ALWAYS_FP32 = ("out_scale",)  # whatever the others' dtype
NOT_TRAINED = ("image", "row_scale")  # no gradients
QUANTIZED = ("quantize", "quantized_linear", "layer_norm_quantized", "attention_quantized")
# composed of others' or PyTorch's where it trains; losses, whose call has the gradients; or never
# trained
NO_BACKWARD = (
    "classifier", "conv_norm", "distillation_loss", "sparse_cross_entropy", *QUANTIZED,
)  # fmt: skip
# most of DeiT's time first
OPS = (
    "linear", "layer_norm_linear", "attention", "layer_norm", "patch_embed", "classifier",
    "layer_norm_attention", "layer_norm_mlp", "distillation_loss", "sparse_cross_entropy",
    "layer_norm_quantized", "quantized_linear", "attention_quantized", "quantize",
    "talking_heads", "window_attention", "conv_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """What a benchmark file hands to its fixture `compare`.

    Attributes:
        name: Name of the operation.
        call: The public function.
        reference: The same in plain PyTorch.
        inputs: `inputs(**case, device=...)` makes the arguments.
        reads: Given the arguments, the parts of them that are read; None: all of them.
        exact: The reference without the rounding of its result; None: the reference.
    """

    name: str
    call: Callable
    reference: Callable
    inputs: Callable
    reads: Callable | None = None
    exact: Callable | None = None


def operations(op: str) -> list[Operation]:
    """The operations that benchmarks/bench_<op>.py times."""
    module = importlib.import_module(f"benchmarks.bench_{op}")
    found: list[Operation] = []

    def compare(call, reference, inputs, name=op, reads=None, exact=None):
        found.append(Operation(name, call, reference, inputs, reads, exact))

    for name, function in vars(module).items():
        if name.startswith("test_"):
            function(compare)
    return found


def implementation_of(fn: Callable, reference: Callable, implementation: str):
    """What runs an implementation.

    Args:
        fn: The public function.
        reference: The same in plain PyTorch.
        implementation: "eager" for the reference, "compiled" for it under torch.compile, "fused"
            for `fn`, else one of `fn`'s implementations.

    Returns:
        A callable, and what serves it: None where `auto` decides.
    """
    if implementation == "eager":
        return reference, "torch"
    if implementation == "compiled":
        return torch.compile(reference, dynamic=False), "torch.compile"
    if implementation == "fused":
        return fn, None
    return lambda **inputs: fn(**inputs, implementation=implementation), implementation


def both_ways(call: Callable) -> Callable:
    """Forward and backward: the outputs of `call`, then the gradients of every trained argument.

    The upstream gradients are arguments named upstream_0, upstream_1, ...
    """

    def run(**arguments):
        upstream = [arguments.pop(n) for n in sorted(arguments) if n.startswith("upstream_")]
        inputs = {
            name: t.detach().requires_grad_()
            for name, t in arguments.items()
            if isinstance(t, torch.Tensor) and t.is_floating_point() and name not in NOT_TRAINED
        }
        with torch.enable_grad():
            outputs = tensors(call(**arguments | inputs))
            gradients = torch.autograd.grad(outputs, list(inputs.values()), upstream)
        return (*(y.detach() for y in outputs), *gradients)

    return run


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    """The arguments in another dtype; views of one tensor stay views of one tensor."""
    cast, bases = {}, {}
    for name, t in inputs.items():
        if not isinstance(t, torch.Tensor) or not t.is_floating_point() or name in ALWAYS_FP32:
            cast[name] = t
            continue
        base = t if t._base is None else t._base
        if id(base) not in bases:
            bases[id(base)] = base.to(dtype)
        cast[name] = bases[id(base)].as_strided(t.shape, t.stride(), t.storage_offset())
    return cast


def tensors(values) -> list[torch.Tensor]:
    """All tensors of a result, a Quantized's values and scales among them."""
    values = values if isinstance(values, torch.Tensor) else list(values)
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def traffic(read, plain, inputs, dtype, implementation) -> tuple[int, str]:
    """Bytes that must move, and the precision of the matmuls.

    For the operands as they are given; for the implementation "bf16", which computes the same from
    dequantized operands (`wide_x` for `x`), for those and a result of that dtype.
    """
    if implementation == "bf16":
        wide = {name: inputs.get(f"wide_{name}", t) for name, t in read.items()}
        y = plain.values if isinstance(plain, Quantized) else plain
        return nbytes(wide.values()) + y.numel() * dtype.itemsize, PRECISIONS[dtype]
    x = next((inputs[name] for name in ("x", "qkv", "q") if name in inputs), None)
    given = x.values.dtype if isinstance(x, Quantized) else getattr(x, "dtype", dtype)
    formats = {of: name for name, of in FORMATS.items()}
    return nbytes(read.values()) + nbytes(plain), formats.get(given, PRECISIONS[dtype])


def nbytes(values) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors(values))


def agree(got, plain, exact: Callable, inputs: dict) -> float:
    """The relative error of a result.

    Args:
        got: The result.
        plain: The reference's in the same dtype.
        exact: The reference, which is called in fp32.
        inputs: Its arguments.

    Raises:
        Mismatch: The error is above twice that of `plain`.
    """
    truth = exact(**cast(inputs, torch.float32))
    error, allowed = error_of(got, truth), 2 * error_of(plain, truth)
    allowed += allowance(inputs)
    if not error <= allowed:  # NaN too
        raise Mismatch(f"relative error {error:.1e}, allowed {allowed:.1e}")
    return error


def error_of(got, truth) -> float:
    """Relative error, root mean square over all outputs: each counts alike, whatever its size."""
    got, truth = ([dequantize(y)] if isinstance(y, Quantized) else y for y in (got, truth))
    errors = [
        (g.double() - t.double()).norm() / t.double().norm()
        for g, t in zip(tensors(got), tensors(truth), strict=True)
    ]
    return torch.stack(errors).square().mean().sqrt().item()


def flops_of(reference: Callable, inputs: dict) -> int:
    """FLOPs of the matmuls, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        reference(**inputs)
    return counter.get_total_flops()
