"""How operators meet PyTorch: registration, the dispatcher bypass, autograd, tracing, transforms."""

import warnings
from contextlib import nullcontext
from functools import wraps

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree
from torch.utils.flop_counter import register_flop_formula


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
        return (self.op if needs_dispatcher(*tensors) else self.body)(*args)


def needs_dispatcher(*tensors: torch.Tensor) -> bool:
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


def no_flops(*args, **kwargs) -> int:
    """For `Op.register_flops`: an operator without any."""
    return 0


def custom_op(name: str):
    """Decorator: the function as the `Op` of that name."""
    return lambda body: Op(name, body)


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active. They know
    PyTorch's operations and no custom operator, so those serve."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def warn_of_transforms() -> None:
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


register_flop_formula(torch.ops.deit_fast.no_gradient)(no_flops)


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


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv is made for kernels, and takes its time on the host
