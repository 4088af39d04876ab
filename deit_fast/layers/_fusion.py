"""Decides, at each call of a drop-in module, what of it runs fused.

A fused operation reads the parameters of several modules and calls none of them: it bypasses them.
That is exact as long as they are timm's, nothing intercepts their calls and no dropout is active.
After `accelerate` a user may still add hooks, adapters or other layers, set a `forward`, or switch
to train(). So each drop-in module asks for its `plan` at every call. There are three outcomes:

    fused              one or a few kernels for the whole module
    partially fused    a Linear has to be called (a LoRA adapter, a hook); the rest stays fused
    unfused            timm's own forward runs; its parts are drop-in modules that plan for
                       themselves

From top to bottom:

    FusionPlan         the outcome, with the reason for what is not fused
    PlanCache          the last plan of a module
    plan_for           the entry, at each call: the cached plan if it is current, else a new one
    is_traced          whether a tracer is recording timm's layers
    make_plan          makes a plan by examining the module and all that it bypasses
    warnings           one for each reason, at the first call that meets it

It builds on three modules: `_fusible` (what the class of a drop-in module declares), `_hooks` (what
intercepts a call) and `_snapshot` (how a call finds out that nothing has changed, so that it need
not examine each block again, which takes a hundred look-ups).
"""

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Proxy

from ._fusible import Fusible, bypassed_modules, timm_class_of
from ._hooks import can_bypass, is_monkey_patched, why_intercepted
from ._snapshot import Snapshot


class FusionPlan(NamedTuple):
    """How a drop-in module runs now."""

    unfused: str | None = None  # why timm's own forward runs; None: it does not
    called_linears: tuple[tuple[str, str], ...] = ()  # (name, why) of Linears that must be called
    cause: nn.Module | None = None  # the submodule that `unfused` is about

    def __str__(self):
        if self.unfused:
            return f"{self.unfused}: runs timm's own forward, unfused"
        called = ", ".join(f"{name} {why}" for name, why in self.called_linears)
        return f"{called}: called, the rest is fused" if called else "fused"


FUSED = FusionPlan()
_TRACED = FusionPlan("is traced by torch.fx or torch.jit")


class PlanCache:
    """The last plan of one drop-in module, with the module's name for warnings.

    A copy or a pickle of the module keeps the name alone.
    """

    __slots__ = ("name", "snapshot", "__weakref__")

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.snapshot: Snapshot | None = None

    def __deepcopy__(self, memo):
        return PlanCache(self.name)

    def __reduce__(self):
        return PlanCache, (self.name,)


def plan_for(fast: Any, x: object) -> FusionPlan:
    """How a drop-in module runs on `x`; warns once for each reason not to be fused.

    It is the method `plan` of every drop-in module.

    Args:
        fast: the module.
        x: its first input, a tensor, or a proxy of a tracer.

    Returns:
        `FUSED` itself where all is fused, so that `is` can compare.
    """
    if torch.compiler.is_compiling():
        plan = make_plan(fast)
        if plan is not FUSED:
            _warn_in_compilation(_name(fast), plan.unfused, plan.called_linears)
        return plan
    if is_traced(x):
        return _TRACED
    cache = fast.__dict__.get("_plan_cache")
    if cache is None:
        cache = fast.__dict__["_plan_cache"] = PlanCache()
    snapshot = cache.snapshot
    # a DataParallel replica of the module on another device shares the cache
    if snapshot is not None and snapshot.modules[0] is fast and snapshot.is_current():
        if not fast.rechecks_why_not or type(fast).why_not(fast) == snapshot.result.unfused:
            return snapshot.result
    inner = [m for _, m, _ in bypassed_modules(fast)]
    plan = make_plan(fast)
    cache.snapshot = Snapshot([fast, *inner], inner, plan)
    if plan is not FUSED:
        _warn_once(plan, fast, _name(fast))
    return plan


def is_traced(x: object) -> bool:
    """Whether torch.fx or torch.jit.trace is recording, and so timm's own layers have to run.

    Its graph shall have timm's layers, by timm's names, and no operator that a TorchScript runtime
    does not know.
    """
    if torch.jit.is_tracing():
        _warn_once(_TRACED, torch.jit, "torch.jit.trace")
    elif type(x) is not torch.Tensor and isinstance(x, Proxy):
        _warn_once(_TRACED, x.tracer, "torch.fx")
    else:
        return False
    return True


def make_plan(fast: Any) -> FusionPlan:
    """Make the plan of a drop-in module from all that is inside it now."""
    if not fast.has_plan:
        return FUSED
    if not can_bypass():
        return FusionPlan("hooks on all modules are set")
    if is_monkey_patched(fast.timm_class, "forward"):
        return FusionPlan(f"the forward of timm's {fast.timm_class.__name__} was replaced")
    why = type(fast).why_not(fast)
    if why is not None:
        return FusionPlan(why)
    called: list[tuple[str, str]] = []
    for name, module, parent in bypassed_modules(fast):
        if any(name.startswith(f"{other}.") for other, _ in called):
            continue  # inside a module that is called
        why = why_intercepted(module)
        is_linear = isinstance(parent, Fusible) and name.rpartition(".")[2] in parent.linears
        if why is None and is_linear:
            why = parent.why_not_linear(module)
        if why is None and type(module) is nn.Dropout and module.p > 0:
            why = "drops numbers" if _is_active(name, module, parent) else None
        if why is None and is_monkey_patched(timm_class_of(module), "forward"):
            why = f"is a {timm_class_of(module).__name__}, whose forward was replaced"
        if why is None:
            continue
        if not (is_linear and fast.fuses_around_linears and parent.fuses_around_linears):
            return FusionPlan(f"{name} {why}", cause=module)
        called.append((name, why))
    return FusionPlan(called_linears=tuple(called)) if called else FUSED


def _is_active(name: str, dropout: nn.Dropout, attn: nn.Module) -> bool:
    """Whether a dropout is active: PyTorch's fused attention goes by the attention's mode."""
    if name.endswith("attn_drop") and getattr(attn, "fused_attn", False):
        return attn.training
    return dropout.training


# Warnings. The reasons that a module was warned about, by the module they are about: a reason that
# concerns both a block and its part is told once.
_warned: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def suppress_warning(fast: Any) -> None:
    """Warn no more about why a module is not fused now: `accelerate` reports it."""
    plan = make_plan(fast)
    if plan is not FUSED:
        _reasons(plan, fast).add(_reason(plan))


def _warn_once(plan: FusionPlan, fast: Any, name: str) -> None:
    reasons, reason = _reasons(plan, fast), _reason(plan)
    if reason not in reasons:
        reasons.add(reason)
        warnings.warn(f"{name}: {plan}", stacklevel=6)


def _reasons(plan: FusionPlan, fast: Any) -> set[str]:
    return _warned.setdefault(plan.cause or fast, set())


def _reason(plan: FusionPlan) -> str:
    return plan.unfused.partition(" ")[2] if plan.cause and plan.unfused else str(plan)


@torch.compiler.assume_constant_result
def _warn_in_compilation(name: str, *plan: Any) -> None:
    warnings.warn(f"{name}: {FusionPlan(*plan)}", stacklevel=2)


def _name(fast: Any) -> str:
    cache = fast.__dict__.get("_plan_cache")
    return (cache and cache.name) or type(fast).__name__
