"""How operators meet PyTorch: registration, dispatcher bypass, transforms, tracing, autograd."""

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Generic, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree
from torch.utils.flop_counter import register_flop_formula

from . import _plan_recorder, _plans

P = ParamSpec("P")
R = TypeVar("R")
Formula = TypeVar("Formula", bound=Callable[..., object])


class Op(Generic[R]):
    """An operator: registered with PyTorch, and called without the dispatcher where that is safe.

    torch.compile, export and autograd see the registered operator. Where none of them records the
    call, the body is called directly: the dispatcher costs a custom operator more time on the host
    than a small kernel takes on a GPU.
    """

    def __init__(self, name: str, body: Callable[..., R]):
        self.body = body
        self.op = torch.library.custom_op(name, body, mutates_args=())
        self.register_fake = self.op.register_fake
        self.register_autograd = self.op.register_autograd
        _plan_recorder.bodies[self.op._opoverload] = body

    def register_flops(self, formula: Formula) -> Formula:
        """Decorator: what PyTorch's FlopCounterMode counts for a call.

        The formula gets the call's arguments, with shapes in place of tensors, and `out_shape`. It
        counts two FLOPs per multiply-add of the matmuls and convolutions in the definition of the
        operation. Those that backward recomputes are not counted.
        """
        register_flop_formula(self.op._opoverload.overloadpacket)(formula)
        return formula

    def __call__(self, *args: object) -> R:
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        function = self.op if needs_dispatcher(*tensors) else self.body
        recorder = _plans.recording()
        if recorder is None:
            return function(*args)
        with recorder.range(self.op._qualname):
            return function(*args)


def custom_op(name: str) -> Callable[[Callable[..., R]], Op[R]]:
    """Decorator: the function as the `Op` of that name."""
    return lambda body: Op(name, body)


def no_flops(*args: object, **kwargs: object) -> int:
    """FLOP formula of an operator without matmuls, for `Op.register_flops`."""
    return 0


def needs_dispatcher(*tensors: torch.Tensor) -> bool:
    """Whether autograd, a compiler or a tracer has to see a call with these tensors."""
    return (
        torch.compiler.is_compiling()
        or not all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        or tensors[0].is_meta
        or wants_grad(*tensors)
        # fake tensors, make_fx, counters; a plan's recorder does not count
        or torch._C._len_torch_dispatch_stack() > (_plans.recording() is not None)
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active.

    They know PyTorch's operations and no custom operator, so PyTorch's serve under them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_warned: list[bool] = []


@torch.compiler.assume_constant_result
def warn_of_transforms() -> None:
    """Warn, once per process, that no kernel runs under a transform."""
    if not _warned:
        _warned.append(True)
        warnings.warn(
            "torch.func and forward-mode differentiation run PyTorch's operations, no kernels",
            stacklevel=5,
        )


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """PyTorch's attention; only its math backend has a forward-mode derivative.

    A CPU that records it computes 16-bit operands in fp32, and rounds the result: backward takes a
    fifth of the time so (torch 2.14, AVX512 with bf16, 51 tokens, heads of 32 features).
    """
    if is_transformed():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if q.device.type == "cpu" and q.itemsize == 2 and wants_grad(q, k, v, mask):
        wide = [None if t is None else t.float() for t in (q, k, v, mask)]
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(*wide, scale=scale).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def at_least(rows: int, least: int) -> bool:
    """`rows >= least`, for choices that change the time and never the result.

    A program exported with a dynamic batch serves any number of rows: there it is False, and leaves
    no guard.
    """
    return statically_known_true(rows >= least) if is_exporting() else rows >= least


def at_most(rows: int, most: int) -> bool:
    """`rows <= most`, as `at_least`."""
    return statically_known_true(rows <= most) if is_exporting() else rows <= most


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """torch.compiler.is_exporting(), a constant of the trace."""
    return torch.compiler.is_exporting()  # traced, torch 2.11 takes every compilation for one


def inference_only(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: what the function returns carries no gradient, and backward says so.

    Where an argument requires a gradient the results require one too, and backward raises
    RuntimeError: rounding to a quantized format would stop the gradient silently, and of a float
    result only some arguments would get theirs. Under torch.func the call itself raises.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
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
    "{}: quantized operations are for inference, no gradient passes through them; "
    "call it under torch.no_grad(), or train the model before it is quantized"
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
    """Raise: as an operator, so that a graph with its backward compiles and only running raises."""
    raise RuntimeError(_NO_GRADIENT.format(op))


@_no_gradient.register_fake
def _(op, size, dtype, device):
    return torch.empty(size, dtype=dtype, device=device)


register_flop_formula(torch.ops.deit_fast.no_gradient)(no_flops)


def differentiable(
    forward: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    upstream: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again, as the kernels' cannot: for create_graph=True.

    Args:
        forward: The operation in PyTorch's operations, called with `tensors`.
        tensors: Its arguments. They may depend on each other: only the path through this operation
            counts.
        upstream: The gradient of its result.

    Returns:
        The gradient of each tensor; None where it has none.
    """
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in tensors]
        present = [t for t in aliases if t is not None and t.requires_grad]
        if not present:
            return [None] * len(aliases)
        grads = torch.autograd.grad(
            forward(*aliases), present, upstream, create_graph=True, allow_unused=True
        )
    found = dict(zip(map(id, present), grads, strict=True))
    return [None if t is None else found.get(id(t)) for t in aliases]


def cdiv(a: int, b: int) -> int:
    """Ceiling division on the host; triton.cdiv is made for kernels and is slow there."""
    return -(-a // b)
