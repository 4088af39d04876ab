"""What the chip is, and which implementation serves an operation on it.

`resolve(op, x, implementation)` turns the caller's choice into the name of an implementation:

    "auto"    what `choose` says for the tensor's device and dtype (CPU: always "torch")
    "triton"  the Triton kernel; raises where it cannot run
    "cublas"  `linear` only: cuBLAS followed by one fused elementwise kernel
    "torch"   the plain PyTorch reference
"""

import os
import warnings
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree
from torch.utils.flop_counter import register_flop_formula

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when kernels are decorated

# these need tensor cores
PRODUCTS = (
    "linear",
    "patch_embed",
    "classifier",
    "attention",
    "talking_heads",
    "window_attention",
)
ROW_KERNELS = (
    "layer_norm",
    "add_layer_norm",
    "distillation_loss",
    "sparse_cross_entropy",
    "conv_norm",
    "quantize",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMAT_NAMES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
# what `exclude` and DEIT_FAST_EXCLUDE take: operations, folding LayerNorm, a quantized format
EXCLUDABLE = (*PRODUCTS, *ROW_KERNELS, "layer_norm_linear", *FORMAT_NAMES.values())
_excluded: frozenset[str] = frozenset()


def exclude(*names: str) -> None:
    """From now on "auto" leaves these operations to PyTorch in this process, instead of those that
    an earlier call named: for a machine on which a kernel is wrong. The environment variable
    DEIT_FAST_EXCLUDE, names with commas between them, does the same. Of a quantized format nothing
    takes the place: using it raises RuntimeError. Raises ValueError for unknown names."""
    unknown = [name for name in names if name not in EXCLUDABLE]
    if unknown:
        raise ValueError(f"exclude: unknown {', '.join(unknown)}, want some of {EXCLUDABLE}")
    global _excluded
    _excluded = frozenset(names)


def excluded() -> frozenset[str]:
    """What `exclude` named last."""
    return _excluded


exclude(*filter(None, os.environ.get("DEIT_FAST_EXCLUDE", "").replace(" ", "").split(",")))


class Op:
    """An operator registered with PyTorch, for torch.compile, export and autograd; and its body,
    called straight where none of them watches. The dispatcher costs a custom operator more time on
    the host than a small kernel takes on a GPU."""

    def __init__(self, name: str, body):
        self.body = body
        self.op = torch.library.custom_op(name, body, mutates_args=())
        self.register_fake = self.op.register_fake
        self.register_autograd = self.op.register_autograd

    def register_flops(self, formula):
        """Decorator: what PyTorch's FlopCounterMode counts for a call, given its arguments with
        shapes for tensors, and out_shape: two for each multiply-add of the products and
        convolutions that the mathematics has, so none for those that backward makes again."""
        register_flop_formula(self.op._opoverload.overloadpacket)(formula)
        return formula

    def __call__(self, *args):
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        return (self.op if is_watched(*tensors) else self.body)(*args)


def is_watched(*tensors: torch.Tensor) -> bool:
    """Whether autograd, a compiler or a tracer has to see what happens to these tensors."""
    return (
        torch.compiler.is_compiling()
        or not all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        or tensors[0].is_meta
        or wants_grad(*tensors)
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx, counters
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )


def no_products(*args, **kwargs) -> int:
    """For `Op.register_flops`: an operator without any."""
    return 0


def custom_op(name: str):
    """Decorator: the function as the `Op` of that name."""
    return lambda body: Op(name, body)


class Choice(NamedTuple):
    implementation: str
    reason: str


_CPU = Choice("torch", "no CUDA device: plain PyTorch")
_OLD = Choice("torch", "Triton needs compute capability 7.0")
_OTHER_DTYPE = Choice("torch", "the kernels compute in fp32: fp32, fp16 and bf16 only")
_EXCLUDED = Choice("torch", "excluded: see deit_fast.kernels._runtime.exclude")
_ROWS = Choice("triton", "bound by memory: one pass instead of several")
_NO_TENSOR_CORES = "Triton uses no tensor cores below compute capability 8.0"
_FP32 = "fp32 products run on the FMA units in Triton"
_FUSED = Choice("triton", "tensor cores, everything around the product fused; not yet measured")
_WITHOUT_TENSOR_CORES = {
    "linear": ("cublas", "; cuBLAS with bias, GELU and residual in one Triton kernel"),
    "attention": ("torch", "; PyTorch's scaled_dot_product_attention"),
    "window_attention": ("torch", "; PyTorch's scaled_dot_product_attention"),
    "patch_embed": ("torch", "; PyTorch's convolution"),
    "classifier": ("torch", "; cuBLAS"),
    "talking_heads": ("torch", "; PyTorch's products and softmax"),
}


# Storage in eight bits -> the first chip that multiplies it, and what to do on the others.
EIGHT_BITS = {
    torch.float8_e4m3fn: ((8, 9), "fp8 (e4m3) needs compute capability 8.9; int8 needs 8.0"),
    torch.int8: ((8, 0), "Triton multiplies int8 on tensor cores from compute capability 8.0"),
}
_EIGHT_BITS = Choice("triton", "operands in eight bits, everything around the product fused")


def choose(op: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> Choice:
    """The implementation that serves `op` on a chip (None: a CPU) and why; pure, so printable.
    `dtype`: of the operands; where one of eight bits has no kernel the name is "none".

    Compute capability 10.x has the rules of 9.0, and 12.x those of 8.x, until something else is
    measured: see `is_datacenter`.
    """
    if dtype in EIGHT_BITS and capability is not None:
        least, reason = EIGHT_BITS[dtype]
        if FORMAT_NAMES[dtype] in _excluded:
            return Choice("none", f"{FORMAT_NAMES[dtype]} is excluded")
        return _EIGHT_BITS if capability >= least else Choice("none", reason)
    if capability is None:
        return _CPU
    if capability < (7, 0):
        return _OLD
    if op in _excluded:
        return _EXCLUDED
    if dtype not in DTYPES:
        return _OTHER_DTYPE
    if op in ROW_KERNELS:
        return _ROWS
    for applies, reason in (
        (capability < (8, 0), _NO_TENSOR_CORES),
        (dtype == torch.float32, _FP32),
    ):
        if applies:
            implementation, instead = _WITHOUT_TENSOR_CORES[op]
            return Choice(implementation, reason + instead)
    return _FUSED


def is_datacenter(capability: tuple[int, int]) -> bool:
    """Whether configurations for H100 fit: tensor descriptors, and 227 KB of shared memory a block.
    Chips of compute capability 12.x have the descriptors but 99 KB, and matrix instructions like
    those of 8.x, whose accumulators take more registers."""
    return capability[0] in (9, 10)


class Chip(NamedTuple):
    """What rules and tuned tables go by."""

    name: str
    capability: tuple[int, int]
    processors: int


_INTERPRETED = Chip("Triton's interpreter", (9, 0), 4)  # few, so that small cases get large tiles
_pretended: Chip | None = None


@contextmanager
def pretend(chip: Chip):
    """Within it every tensor counts as lying on `chip`, for tests and tables of choices: on a CPU
    the Triton parts then need the interpreter. Not for use from several threads at once."""
    global _pretended
    before, _pretended = _pretended, chip
    try:
        yield
    finally:
        _pretended = before


def is_pretended() -> bool:
    """Whether tensors count as lying on a chip that is not there."""
    return _pretended is not None


@cache
def _cuda_chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    return Chip(found.name, (found.major, found.minor), found.multi_processor_count)


def chip(device: torch.device) -> Chip:
    """The chip whose configurations serve a tensor there; a CPU's kernels are interpreted."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return _INTERPRETED
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


@torch.compiler.assume_constant_result
def capability(kind: str, index: int | None) -> tuple[int, int] | None:
    """Compute capability of a device, None for a CPU; a constant under torch.compile."""
    if kind != "cuda" and _pretended is None:
        return None
    return chip(torch.device(kind, index)).capability


def resolve(
    op: str, x: torch.Tensor, implementation: str, allowed=("triton", "torch"),
    dtype: torch.dtype | None = None,
) -> str:  # fmt: skip
    """The implementation that will run `op` on `x`; `dtype`, where it reads or writes eight bits:
    which. Raises ValueError for an unknown name and RuntimeError for a Triton kernel where it
    cannot run: nothing takes the place of eight bits."""
    if implementation == "torch":
        return "torch"
    on, eight_bits = capability(x.device.type, x.device.index), dtype is not None
    if eight_bits and on is not None:
        choice = choose(op, on, dtype)
        if choice.implementation == "none":
            raise RuntimeError(f"{op}: {choice.reason}, x is on a chip of {on[0]}.{on[1]}")
    if implementation == "auto":
        dtype = dtype or (autocast_dtype(x) if op in PRODUCTS else None)
        implementation = choose(op, on, dtype or x.dtype).implementation
    else:
        if implementation not in allowed:
            names = ", ".join(repr(name) for name in ("auto", *allowed))
            raise ValueError(f"implementation: {implementation!r} for {op}, want one of {names}")
        if not (x.is_cuda or x.is_meta or INTERPRET or is_pretended()):
            raise RuntimeError(
                f"implementation {implementation!r} of {op} needs a CUDA tensor, x is on "
                f"{x.device}; use 'torch' or 'auto' there"
            )
        if x.dtype not in DTYPES and x.dtype not in (torch.uint8, dtype):
            raise TypeError(f"{op}: dtype {x.dtype}, want float32, float16 or bfloat16")
    if implementation == "torch" or not is_transformed():
        return implementation
    if eight_bits:
        raise RuntimeError(f"{op}: eight bits under torch.func, want implementation='torch'")
    _warn_of_transforms()
    return "torch"


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active. They know
    PyTorch's operations and no custom operator, so those serve."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def _warn_of_transforms() -> None:
    if not _warned:
        _warned.append(True)
        warnings.warn(
            "torch.func and forward-mode differentiation run PyTorch's operations, no kernels",
            stacklevel=5,
        )


_warned = []


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask, scale) -> torch.Tensor:
    """PyTorch's attention; of its ways only the plain one has a forward-mode derivative."""
    with sdpa_kernel(SDPBackend.MATH) if is_transformed() else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks of matrix products on x's device; None outside it."""
    kind = x.device.type
    if kind == "meta":
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(x: torch.Tensor):
    """A context in which products on x's device keep their dtype."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv is made for kernels, and takes its time on the host


def at_least(rows: int, least: int) -> bool:
    """`rows >= least`, for choices that cost time and never change the result. A program exported
    with a dynamic batch serves any number of rows: there it is False, and leaves no guard."""
    return statically_known_true(rows >= least) if _is_exporting() else rows >= least


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()  # traced, torch 2.11 takes every compilation for one


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def inference_only(function):
    """Decorator: what the function returns carries no gradient, and says so. Where an argument
    wants one the results require one too, and backward raises RuntimeError: rounding to eight bits
    would stop it in silence, and of a float result only some arguments would get theirs. Under
    torch.func the call raises."""

    @wraps(function)
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        wanting = [t for t in _pytree.tree_leaves((args, kwargs)) if _requires_grad(t)]
        if wanting and is_transformed():
            raise RuntimeError(_NO_GRADIENT.format(function.__name__))
        with torch.no_grad():
            result = function(*args, **kwargs)
        if not wanting:
            return result
        made, structure = _pytree.tree_flatten(result)
        made = _NoBackward.apply(function.__name__, len(made), *made, *wanting)
        return _pytree.tree_unflatten(list(made), structure)

    return run


def _requires_grad(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


_NO_GRADIENT = (
    "{}: eight bits are for inference, no gradient passes through them; "
    "call it under torch.no_grad(), or train the model before it is quantised"
)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op, ctx.count = op, count
        ctx.like = [(list(t.shape), t.dtype, t.device) for t in tensors[count:]]
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *upstream):
        grads = (_no_gradient(ctx.op, *like) for like in ctx.like)
        return None, None, *(None,) * ctx.count, *grads


@torch.library.custom_op("deit_fast::no_gradient", mutates_args=())
def _no_gradient(
    op: str, size: list[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An operator, so that a graph with its backward compiles, and only running that raises."""
    raise RuntimeError(_NO_GRADIENT.format(op))


@_no_gradient.register_fake
def _(op, size, dtype, device):
    return torch.empty(size, dtype=dtype, device=device)


register_flop_formula(torch.ops.deit_fast.no_gradient)(no_products)


def differentiable(forward, tensors, upstream):
    """Gradients of forward(*tensors) that can be differentiated again, as the kernels' cannot: for
    create_graph=True. Only the path through this operation counts: `tensors` may depend on each
    other."""
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in tensors]
        present = [t for t in aliases if t is not None and t.requires_grad]
        if not present:
            return [None] * len(aliases)
        grads = torch.autograd.grad(
            forward(*aliases), present, upstream, create_graph=True, allow_unused=True
        )
    left = dict(zip(map(id, present), grads, strict=True))
    return [None if t is None else left.get(id(t)) for t in aliases]


def cast(dtype: torch.dtype | None, *tensors):
    """The tensors in `dtype`; as they are where it is None. None stays None."""
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


def expect(op: str, x: torch.Tensor, dtype: torch.dtype | None = None, /, **arguments):
    """Raise ValueError or TypeError unless each `name=(tensor, shape)` has that shape, is on x's
    device and (if given) has `dtype`. A tensor of None passes."""
    for name, (t, shape) in arguments.items():
        if t is None:
            continue
        if t.shape != torch.Size(shape):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, want {tuple(shape)}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, want {x.device}")
        if dtype is not None and t.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, want {dtype}")
