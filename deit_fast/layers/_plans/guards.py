"""What a method may read of its modules: a plan runs only while all of it is as it was."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from deit_fast.kernels import _plan_library
from deit_fast.kernels._plan_library import CLASS, ITEM, SIZE, TYPE, VALUE

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# of a class: what a method reads of it
CLASS_ATTRIBUTES = (
    "forward", "forward_features", "forward_head", "forward_cls", "pool", "_pos_embed",
    "get_attention_biases", "backend", "recompute", "heads",
)  # fmt: skip
# of a module's __dict__: what no forward reads
IGNORED = {"_plans", "_plan_cache", "_non_persistent_buffers_set", "_is_full_backward_hook",
           "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
           "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
           "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}  # fmt: skip


class Seen:
    """A module and those inside it, as they are now.

    Attributes:
        guards: they hold while nothing has changed, kernels/csrc/guards.h.
        held: the parameters and buffers.
        why_not: why no plan can be made with them; None: it can be tried.

    Args:
        module: whose method is called.
        method: its name.
        without: names of children that the method does not touch.
    """

    def __init__(self, module: nn.Module, method: str, without: Sequence[str] = ()) -> None:
        modules = list(inside(module, without))
        tensors = (t for m in modules for d in (m._parameters, m._buffers) for t in d.values())
        self.held = list({id(t): t for t in tensors if t is not None}.values())
        reasons = (
            *map(why_no_tensor, self.held), *(_why_no_module(m, module, method) for m in modules),
        )  # fmt: skip
        self.why_not = next(filter(None, reasons), None)
        if any(getattr(nn_module, f"_global{name}") for name in HOOKS):
            self.why_not = "PyTorch has hooks on every module"
        self.guards = _plan_library.guards(_guards(module, without))


def why_no_tensor(tensor: Tensor) -> str | None:
    """Why no plan takes a tensor; None: it does."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a tensor is a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"a tensor has the layout {tensor.layout}"
    return None


def _why_no_module(part, module, method):
    name = type(part).__name__
    if type(part).__module__.partition(".")[0] not in ("torch", "timm", "deit_fast"):
        if part is not module or method not in type(part).__dict__:
            return f"a {name} is of {type(part).__module__}"
    if part is module:
        return None
    if "forward" in part.__dict__ or part._compiled_call_impl:
        return f"a {name} has a forward of its own"
    if any(getattr(part, hooks) for hooks in HOOKS):
        return f"a {name} has hooks"
    return None


def inside(module: nn.Module, without: Sequence[str] = ()) -> Iterator[nn.Module]:
    """A module and those inside it, parents first."""
    yield module
    for name, child in module._modules.items():
        if child is not None and name not in without:
            yield from inside(child)


def _guards(module: nn.Module, without: Sequence[str] = ()) -> Iterator[tuple]:
    """What a method of a module may read of it and of those inside it: kernels/csrc/guards.h."""
    for name in HOOKS:
        hooks = getattr(nn_module, f"_global{name}")
        yield SIZE, hooks, len(hooks), None
    classes: dict[type, None] = {}
    for part in inside(module, without):
        kind = type(part)
        classes |= {kind: None, getattr(kind, "timm_class", kind): None}
        yield TYPE, part, kind, None
        yield from _attributes(part, without if part is module else ())
    for kind in classes:
        for name in CLASS_ATTRIBUTES:
            owner = next((c for c in kind.__mro__ if name in c.__dict__), None)
            if owner is not None:
                yield CLASS, kind, name, owner.__dict__[name]


def _attributes(part, without):
    own = part.__dict__
    yield SIZE, own, len(own), None
    for name, value in own.items():
        if name in IGNORED:
            continue
        if name in HOOKS:
            yield SIZE, value, len(value), None
        elif name in ("_parameters", "_buffers", "_modules"):
            yield ITEM, own, name, value
            yield SIZE, value, len(value), None
            yield from ((ITEM, value, key, one) for key, one in value.items() if key not in without)
        elif isinstance(value, (bool, int, float, str, type(None))):
            yield VALUE, own, name, value
        else:
            yield ITEM, own, name, value
            if name == "pretrained_cfg":
                yield from ((ITEM, value, k, value[k]) for k in ("mean", "std") if k in value)
