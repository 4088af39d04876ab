"""When a fused operation may bypass the modules inside a block.

It reads their parameters and never calls them, which nobody notices while nothing has been done to
them. So each drop-in module asks for its `plan` at every call: fused as long as the modules inside
are those of timm, nobody watches them and no dropout is active; else timm's own forward, through
parts that each ask in turn. Around a Linear that has to be called (an adapter, a hook) the rest of
a ViT's block stays fused.

Examining a block takes a hundred look-ups. They are made again only where something has changed
since the last time, which `Snapshot` finds out in a few microseconds. A hook that is put into a
module's dictionary by hand, without PyTorch's `register_` functions, it does not see.
"""

import warnings
import weakref
from operator import getitem
from typing import NamedTuple

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}
GLOBAL_HOOKS = tuple(getattr(nn_module, "_global" + name) for name in HOOKS)
_said = weakref.WeakKeyDictionary()  # what was warned about -> the reasons given


class Plan(NamedTuple):
    """How a drop-in module runs now."""

    unfused: str | None = None  # why timm's own forward runs
    called: tuple[tuple[str, str], ...] = ()  # Linears that have to be called, and why
    culprit: nn.Module | None = None  # the module inside that the reason is about

    def __str__(self):
        if self.unfused:
            return f"{self.unfused}: runs timm's own forward, unfused"
        called = ", ".join(f"{name} {why}" for name, why in self.called)
        return f"{called}: called, the rest is fused" if called else "fused"


FUSED = Plan()
_TRACED = Plan("is traced by torch.fx or torch.jit")


class Bypasses:
    """What `examine` asks of a drop-in module's class."""

    has_plan = True  # whether it has one; a whole model asks its parts
    linears: tuple[str, ...] = ()  # the Linears whose parameters are read
    calls_linears = False  # whether one that has to be called leaves the rest fused
    always_called: tuple[str, ...] = ()  # what is called in any case
    asks_when_called = False  # whether whoever fuses it calls it, so that it asks for its own plan
    looks_again = False  # whether `why_not` goes by more than a Snapshot has, and runs at each call


class Rule:
    """What a drop-in module remembers of the last time it was examined: nothing that a copy or a
    pickle has to keep, but its name in the model."""

    __slots__ = ("name", "snapshot", "__weakref__")

    def __init__(self, name: str = ""):
        self.name, self.snapshot = name, None

    def __deepcopy__(self, memo):
        return Rule(self.name)

    def __reduce__(self):
        return Rule, (self.name,)


class Snapshot:
    """What may be done to modules, as it was: hooks, layers, their kinds, dropout.

    They are flat lists, which for a block take less than a microsecond each to compare. Looking
    into the 84 dictionaries of its hooks takes ten, so `handles` tells whether PyTorch has given
    out a handle for a hook since they were found empty. `watched`: whose hooks count."""

    __slots__ = (
        "modules", "types", "dicts", "marks", "parts", "weights", "kinds", "facts", "values",
        "classes", "forwards", "watched", "hooks", "hooked", "handles", "plan",
    )  # fmt: skip

    def __init__(self, modules: list[nn.Module], watched: list[nn.Module], plan: Plan = FUSED):
        self.modules, self.types, self.plan = modules, list(map(type, modules)), plan
        self.dicts = [m.__dict__ for m in modules]
        self.marks = _marks(self.dicts)
        parts = [m._modules for m in modules if m._modules]
        self.parts = parts, [dict(p) for p in parts]
        self.weights = [m._parameters for m in modules if "weight" in m._parameters]
        self.kinds = [type(p["weight"]) for p in self.weights]
        facts = [(d, key) for m, d in zip(modules, self.dicts, strict=True) for key in _facts(m)]
        self.facts = [d for d, _ in facts], [key for _, key in facts]
        self.values = list(map(getitem, *self.facts))
        self.classes = list({_timm_class(m): None for m in modules})
        self.forwards = [c.forward for c in self.classes]
        self.watched, self.handles = watched, RemovableHandle.next_id
        self.hooks = _hook_facts(watched)
        self.hooked = any(self.hooks)

    def holds(self) -> bool:
        handles = RemovableHandle.next_id
        if self.handles != handles or self.hooked:
            if _hook_facts(self.watched) != self.hooks:
                return False
            self.handles = handles
        return (
            list(map(type, self.modules)) == self.types
            and _marks(self.dicts) == self.marks
            and self.parts[0] == self.parts[1]
            and list(map(getitem, *self.facts)) == self.values
            and [type(p.get("weight")) for p in self.weights] == self.kinds
            and [c.forward for c in self.classes] == self.forwards
        )


def _facts(module) -> tuple[str, ...]:
    """Attributes that a plan goes by, beside what a fused operation reads at every call."""
    if type(module) is nn.Dropout:
        return ("p", "training")
    if type(module) is nn.GELU:
        return ("approximate",)
    return ("training", "fused_attn") if "fused_attn" in module.__dict__ else ()


def _marks(dicts) -> list[bool]:
    """What was set on instances in the place of their classes' methods."""
    return ["forward" in d or "_compiled_call_impl" in d for d in dicts]


def _hook_facts(modules) -> list[int]:
    """Which hooks all modules have, and how many each of these."""
    own = [len(getattr(m, name)) for m in modules for name in HOOKS]
    return [id(hook) for hook in _hooks()] + own


def _timm_class(module) -> type:
    return module.timm_class if isinstance(module, Bypasses) else type(module)


def plan_of(fast: nn.Module, x) -> Plan:
    """How `fast` runs on `x`; warns once for each reason not to be fused."""
    if torch.compiler.is_compiling():
        plan = examine(fast)
        if plan is not FUSED:
            _say_in_compilation(_name(fast), plan.unfused, plan.called)
        return plan
    if is_traced(x):
        return _TRACED
    rule = fast.__dict__.get("_rule")
    if rule is None:
        rule = fast.__dict__["_rule"] = Rule()
    snapshot = rule.snapshot
    # a replica of the module on another device shares what it remembers
    if snapshot is not None and snapshot.modules[0] is fast and snapshot.holds():
        if not fast.looks_again or type(fast).why_not(fast) == snapshot.plan.unfused:
            return snapshot.plan
    inner = [m for _, m, _ in bypassed(fast)]
    plan = examine(fast)
    rule.snapshot = Snapshot([fast, *inner], inner, plan)
    if plan is not FUSED:
        _say(plan, fast, _name(fast))
    return plan


def is_traced(x) -> bool:
    """Whether torch.fx or torch.jit.trace is to get a graph of timm's layers: by timm's names, and
    of nothing that a TorchScript runtime does not know."""
    if torch.jit.is_tracing():
        _say(_TRACED, torch.jit, "torch.jit.trace")
    elif type(x) is not torch.Tensor and isinstance(x, Proxy):
        _say(_TRACED, x.tracer, "torch.fx")
    else:
        return False
    return True


def examine(fast: nn.Module) -> Plan:
    """How `fast` is to run, from what is in it now."""
    if not fast.has_plan:
        return FUSED
    if not is_bypassable():
        return Plan("hooks on all modules are set")
    if is_patched(fast.timm_class, "forward"):
        return Plan(f"the forward of timm's {fast.timm_class.__name__} was replaced")
    why = type(fast).why_not(fast)
    if why is not None:
        return Plan(why)
    called = []
    for name, module, parent in bypassed(fast):
        if any(name.startswith(f"{other}.") for other, _ in called):
            continue  # its caller's business
        why = why_watched(module)
        is_read = isinstance(parent, Bypasses) and name.rpartition(".")[2] in parent.linears
        if why is None and is_read:
            why = parent.why_not_linear(module)
        if why is None and type(module) is nn.Dropout and module.p > 0:
            why = "drops numbers" if _drops(name, module, parent) else None
        if why is None and is_patched(_timm_class(module), "forward"):
            why = f"is a {_timm_class(module).__name__}, whose forward was replaced"
        if why is None:
            continue
        if not (is_read and fast.calls_linears and parent.calls_linears):
            return Plan(f"{name} {why}", culprit=module)
        called.append((name, why))
    return Plan(called=tuple(called)) if called else FUSED


def _drops(name, drop, attn) -> bool:
    """PyTorch's fused attention has timm hand it the rate, in the attention module's mode."""
    if name.endswith("attn_drop") and getattr(attn, "fused_attn", False):
        return attn.training
    return drop.training


@torch.compiler.assume_constant_result
def is_patched(kind: type, method: str) -> bool:
    """Whether a method of one of timm's or PyTorch's classes is somebody else's."""
    found = getattr(getattr(kind, method, None), "__module__", None) or "timm"
    return found.partition(".")[0] not in ("torch", "timm", "deit_fast")


def bypassed(module: nn.Module, prefix: str = ""):
    """(name, module, parent) of what `module`, fused, does not call. Modules that ask for their own
    plan whenever they run are there, and not what is inside them."""
    for name, child in module._modules.items():
        if child is None or isinstance(module, Bypasses) and name in module.always_called:
            continue
        yield prefix + name, child, module
        if not (isinstance(child, Bypasses) and child.asks_when_called):
            yield from bypassed(child, f"{prefix}{name}.")


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def why_watched(module: nn.Module) -> str | None:
    """Why a module has to be called, apart from what it computes; None: nobody watches it."""
    for name, what in HOOKS.items():
        if getattr(module, name):
            return f"has {what}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if module._compiled_call_impl is not None:
        return "is compiled"
    return None


def is_watched(*modules: nn.Module) -> bool:
    """Whether one of these modules has to be called."""
    return any(GLOBAL_HOOKS) or any(map(why_watched, modules))


def is_bypassable(*modules: nn.Module) -> bool:
    """Whether nobody misses anything if none of these modules is called: as not `is_watched`, but
    for FlopCounterMode, which wants their names, and counts what runs in their place."""
    unseen = not any(GLOBAL_HOOKS) or all(map(_only_names, _hooks()))
    return unseen and not any(map(why_watched, modules))


def is_seen(*modules: nn.Module) -> bool:
    """Whether somebody looks at what goes into one of these modules or comes out of it: not those
    who count by names or gather parameters, FlopCounterMode and FSDP2."""
    if not is_watched(*modules):
        return False
    if not all(_only_names(hook) or _only_gathers(hook) for hook in _hooks(*modules)):
        return True
    return any("forward" in m.__dict__ or m._compiled_call_impl is not None for m in modules)


def _hooks(*modules) -> list:
    """Those on all modules, and those on these."""
    hooks = [hook for some in GLOBAL_HOOKS for hook in some.values()]
    return hooks + [h for m in modules for name in HOOKS for h in getattr(m, name).values()]


def _only_names(hook) -> bool:
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)


def _only_gathers(hook) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def is_plain(linear: nn.Module) -> bool:
    """A plain Linear whose weight is a parameter of plain numbers, and not recomputed by a hook
    (pruning) or kept in another form (torchao)."""
    if type(linear) is not nn.Linear:
        return False
    weight = linear._parameters.get("weight")
    if type(weight) is nn.Parameter:
        return True
    if weight is None:
        return getattr(linear, "_is_replica", False)  # DataParallel's, whose weights are tensors
    if not is_traceable_wrapper_subclass(weight):
        return True
    return type(weight).__module__.startswith("torch.distributed.")  # FSDP2's, between two calls


def class_name(of: object) -> str:
    """With its module, where the name alone may be that of one of PyTorch's or timm's."""
    kind = type(of)
    known = kind.__module__.split(".")[0] in ("torch", "timm", "deit_fast")
    return kind.__qualname__ if known else f"{kind.__module__}.{kind.__qualname__}"


def acknowledge(fast: nn.Module) -> None:
    """What is the matter with it now is no reason to warn: `accelerate` reports it."""
    plan = examine(fast)
    if plan is not FUSED:
        _reasons(plan, fast).add(_reason(plan))


def _say(plan, fast, name):
    reasons, reason = _reasons(plan, fast), _reason(plan)
    if reason not in reasons:
        reasons.add(reason)
        warnings.warn(f"{name}: {plan}", stacklevel=6)


def _reasons(plan, fast):
    """Of a module that a block and a part of the block both look at, one of them tells."""
    return _said.setdefault(plan.culprit or fast, set())


def _reason(plan):
    return plan.unfused.partition(" ")[2] if plan.culprit else str(plan)


@torch.compiler.assume_constant_result
def _say_in_compilation(name, *plan):
    warnings.warn(f"{name}: {Plan(*plan)}", stacklevel=2)


def _name(fast) -> str:
    rule = fast.__dict__.get("_rule")
    return (rule and rule.name) or type(fast).__name__
