"""A snapshot of modules: tells in a few microseconds whether anything was done to them since."""

from collections.abc import Sequence
from operator import getitem
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ._fusible import timm_class_of
from ._hooks import HOOKS, all_hooks


class Snapshot:
    """State of modules: classes, children, hooks, patched forwards, dropout.

    Host time matters here: a snapshot is compared at every forward of a block. Everything is held
    in flat lists, which Python compares in less than a microsecond each. The dictionaries of hooks
    are the exception, a block has 84 of them. PyTorch numbers the handles of hooks, so while no
    handle was given out (`next_hook_id`) and there were no hooks, the dictionaries are not read.

    Not noticed: a hook put into the dictionary of a module by hand, without a `register_` method.

    Args:
        modules: all of them are compared.
        hooked: those whose hooks are compared too.
        result: what was decided for the modules as they are, kept for the caller.
    """

    __slots__ = (
        "modules", "types", "dicts", "overrides", "children", "parameters", "weight_types",
        "attributes", "values", "classes", "forwards", "hooked", "hook_state", "has_hooks",
        "next_hook_id", "result",
    )  # fmt: skip

    def __init__(
        self, modules: list[nn.Module], hooked: list[nn.Module], result: Any = None
    ) -> None:
        self.modules, self.types, self.result = modules, list(map(type, modules)), result
        self.dicts = [m.__dict__ for m in modules]
        self.overrides = _overrides(self.dicts)
        children = [m._modules for m in modules if m._modules]
        self.children = children, [dict(c) for c in children]
        self.parameters = [m._parameters for m in modules if "weight" in m._parameters]
        self.weight_types = [type(p["weight"]) for p in self.parameters]
        pairs = [(d, key) for m, d in zip(modules, self.dicts, strict=True) for key in _names(m)]
        self.attributes = [d for d, _ in pairs], [key for _, key in pairs]
        self.values = list(map(getitem, *self.attributes))
        self.classes = list({timm_class_of(m): None for m in modules})
        self.forwards = [c.forward for c in self.classes]
        self.hooked, self.next_hook_id = hooked, RemovableHandle.next_id
        self.hook_state = _hook_state(hooked)
        self.has_hooks = any(self.hook_state)

    def is_current(self) -> bool:
        """Whether the modules are as they were."""
        next_hook_id = RemovableHandle.next_id
        if self.next_hook_id != next_hook_id or self.has_hooks:
            if _hook_state(self.hooked) != self.hook_state:
                return False
            self.next_hook_id = next_hook_id
        return (
            list(map(type, self.modules)) == self.types
            and _overrides(self.dicts) == self.overrides
            and self.children[0] == self.children[1]
            and list(map(getitem, *self.attributes)) == self.values
            and [type(p.get("weight")) for p in self.parameters] == self.weight_types
            and [c.forward for c in self.classes] == self.forwards
        )


def _names(module: nn.Module) -> tuple[str, ...]:
    """Attributes that decide about fusion and that a fused operation does not read at each call."""
    if type(module) is nn.Dropout:
        return ("p", "training")
    if type(module) is nn.GELU:
        return ("approximate",)
    return ("training", "fused_attn") if "fused_attn" in module.__dict__ else ()


def _overrides(dicts: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each instance has a forward or compiled code of its own."""
    return ["forward" in d or "_compiled_call_impl" in d for d in dicts]


def _hook_state(modules: Sequence[nn.Module]) -> list[int]:
    """The ids of the global hooks, and the number of hooks of each kind of each module."""
    own = [len(getattr(m, name)) for m in modules for name in HOOKS]
    return [id(hook) for hook in all_hooks()] + own
