"""What intercepts the call of a module, so that a fused operation may not bypass it.

`module(x)` is more than `module.forward(x)`. It also runs the hooks of the module, the global hooks
of PyTorch, a `forward` that was set on the instance, and the code of `module.compile()`. A fused
operation reads the module's parameters and does not call it, so none of these would run. Such a
call is called intercepted here.

Some hooks need no more than the name of the module (FlopCounterMode) or prepare its parameters
(FSDP2). Two questions depend on that:

    can_bypass      does nobody notice if the module is not called?
    is_observed     does somebody read the inputs or outputs of the module?
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.module_tracker import ModuleTracker

HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}
GLOBAL_HOOKS = tuple(getattr(nn_module, "_global" + name) for name in HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on this module, global ones not counted."""
    return any(getattr(module, name) for name in HOOKS)


def why_intercepted(module: nn.Module) -> str | None:
    """Why a module has to be called whatever it computes; None if its call is not intercepted."""
    for name, what in HOOKS.items():
        if getattr(module, name):
            return f"has {what}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if module._compiled_call_impl is not None:
        return "is compiled"
    return None


def is_intercepted(*modules: nn.Module) -> bool:
    """Whether the call of at least one of these modules is intercepted."""
    return any(GLOBAL_HOOKS) or any(map(why_intercepted, modules))


def can_bypass(*modules: nn.Module) -> bool:
    """Whether nobody notices if none of these modules is called.

    As not `is_intercepted`, except that FlopCounterMode is ignored: its global hooks only want the
    names of modules, and it counts the operators that run instead.
    """
    unnoticed = not any(GLOBAL_HOOKS) or all(map(_is_module_tracker, all_hooks()))
    return unnoticed and not any(map(why_intercepted, modules))


def is_observed(*modules: nn.Module) -> bool:
    """Whether somebody may read the inputs or the outputs of one of these modules.

    FlopCounterMode, which counts by name, and FSDP2, which gathers parameters, do not read them.
    """
    if not is_intercepted(*modules):
        return False
    if not all(_is_module_tracker(hook) or _is_fsdp(hook) for hook in all_hooks(*modules)):
        return True
    return any("forward" in m.__dict__ or m._compiled_call_impl is not None for m in modules)


def all_hooks(*modules: nn.Module) -> list[Callable]:
    """The global hooks and those of these modules."""
    hooks = [hook for some in GLOBAL_HOOKS for hook in some.values()]
    return hooks + [h for m in modules for name in HOOKS for h in getattr(m, name).values()]


def _is_module_tracker(hook: Callable) -> bool:
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)


def _is_fsdp(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


@torch.compiler.assume_constant_result
def is_monkey_patched(kind: type, method: str) -> bool:
    """Whether a method of a class of PyTorch's or timm's was replaced by another library's."""
    found = getattr(getattr(kind, method, None), "__module__", None) or "timm"
    return found.partition(".")[0] not in ("torch", "timm", "deit_fast")
