"""An operation as its benchmark file describes it: what is called, its reference, its inputs, and
how a result is compared. `benchmarks/bench_<op>.py` is the only place that says so."""

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

KEPT = ("out_scale",)  # in fp32, whatever the others' dtype
UNLEARNT = ("image", "row_scale")  # nothing trains those, so nobody asks for their gradients
EIGHT_BITS = ("quantize", "quantized_linear", "layer_norm_quantized", "attention_quantized")
# composed of others' or PyTorch's where it trains; losses, whose call has the gradients; or never
# trained
NO_BACKWARD = (
    "classifier", "conv_norm", "distillation_loss", "sparse_cross_entropy", *EIGHT_BITS,
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
    """What a benchmark file hands to its `race`. inputs(**case, device=...) makes the arguments;
    reads(arguments): the parts of them that are read; exact: the reference without the rounding of
    its result."""

    name: str
    call: Callable
    reference: Callable
    inputs: Callable
    reads: Callable | None = None
    exact: Callable | None = None


def operations(op: str) -> list[Operation]:
    """Those that benchmarks/bench_<op>.py times."""
    module = importlib.import_module(f"benchmarks.bench_{op}")
    found: list[Operation] = []

    def race(call, reference, inputs, name=op, reads=None, exact=None):
        found.append(Operation(name, call, reference, inputs, reads, exact))

    for name, function in vars(module).items():
        if name.startswith("test_"):
            function(race)
    return found


def implementation_of(fn, reference, implementation):
    """(callable, what serves it or None where `auto` decides)."""
    if implementation == "eager":
        return reference, "torch"
    if implementation == "compiled":
        return torch.compile(reference, dynamic=False), "torch.compile"
    if implementation == "fused":
        return fn, None
    return lambda **inputs: fn(**inputs, implementation=implementation), implementation


def both_ways(call):
    """call, and after its outputs the gradients of every argument that has one."""

    def run(**arguments):
        upstream = [arguments.pop(n) for n in sorted(arguments) if n.startswith("upstream_")]
        inputs = {
            name: t.detach().requires_grad_()
            for name, t in arguments.items()
            if isinstance(t, torch.Tensor) and t.is_floating_point() and name not in UNLEARNT
        }
        with torch.enable_grad():
            outputs = tensors(call(**arguments | inputs))
            gradients = torch.autograd.grad(outputs, list(inputs.values()), upstream)
        return (*(y.detach() for y in outputs), *gradients)

    return run


def cast(inputs, dtype):
    """Views of one tensor stay views of one tensor."""
    cast, bases = {}, {}
    for name, t in inputs.items():
        if not isinstance(t, torch.Tensor) or not t.is_floating_point() or name in KEPT:
            cast[name] = t
            continue
        base = t if t._base is None else t._base
        if id(base) not in bases:
            bases[id(base)] = base.to(dtype)
        cast[name] = bases[id(base)].as_strided(t.shape, t.stride(), t.storage_offset())
    return cast


def tensors(values):
    values = values if isinstance(values, torch.Tensor) else list(values)
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def traffic(read, plain, inputs, dtype, implementation):
    """(bytes, precision of the products): of the operands as they are given; of "bf16", which does
    the same on wide ones (`wide_x` for `x`), of those and of a result as wide."""
    if implementation == "bf16":
        wide = {name: inputs.get(f"wide_{name}", t) for name, t in read.items()}
        y = plain.values if isinstance(plain, Quantized) else plain
        return nbytes(wide.values()) + y.numel() * dtype.itemsize, PRECISIONS[dtype]
    x = next((inputs[name] for name in ("x", "qkv", "q") if name in inputs), None)
    given = x.values.dtype if isinstance(x, Quantized) else getattr(x, "dtype", dtype)
    formats = {of: name for name, of in FORMATS.items()}
    return nbytes(read.values()) + nbytes(plain), formats.get(given, PRECISIONS[dtype])


def nbytes(values):
    return sum(t.numel() * t.element_size() for t in tensors(values))


def agree(got, plain, exact, inputs):
    """The relative error of `got` against `exact` in fp32; raises Mismatch above twice
    that of `plain`, the reference in the same dtype."""
    truth = exact(**cast(inputs, torch.float32))
    error, allowed = error_of(got, truth), 2 * error_of(plain, truth)
    allowed += allowance(inputs)
    if not error <= allowed:  # NaN too
        raise Mismatch(f"relative error {error:.1e}, allowed {allowed:.1e}")
    return error


def error_of(got, truth):
    """Relative, the root of the mean square over all outputs: a small one counts as a large one."""
    got, truth = ([dequantize(y)] if isinstance(y, Quantized) else y for y in (got, truth))
    errors = [
        (g.double() - t.double()).norm() / t.double().norm()
        for g, t in zip(tensors(got), tensors(truth), strict=True)
    ]
    return torch.stack(errors).square().mean().sqrt().item()


def flops_of(reference, inputs):
    with FlopCounterMode(display=False) as counter:
        reference(**inputs)
    return counter.get_total_flops()
