"""The base class of the drop-in modules, and the checks that their `why_not` is made of."""

from typing import Any

import timm.layers
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._fusible import Fusible
from ._fusion import plan_for

BACKENDS = ("auto", "triton", "torch")


class Fast(Fusible):
    """Mixin of every drop-in module.

    `backend` is handed to each operation as its `implementation`: "auto" (Triton on a CUDA device,
    as `deit_fast.kernels._policy.choose` says; PyTorch on a CPU), "triton" or "torch". `plan`
    decides at every call what is fused: see `deit_fast.layers._fusion`.
    """

    backend = "auto"
    stands_for: type  # the class itself, or the one that it does all the work of
    recompute: bool  # of those that have it: see `deit_fast.layers.Block`

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        shards = any(c.__module__.startswith("torch.distributed.fsdp") for c in cls.__bases__)
        if not shards:  # FSDP2 makes a subclass of what it wraps
            cls.stands_for = cls.__dict__.get("stands_for", cls)

    @classmethod
    def why_not_linear(cls, linear: nn.Module) -> str | None:
        """Why one of `linears` has to be called because of what it is; None: it has not."""
        if is_plain_linear(linear):
            return None
        if type(linear) is nn.Linear:
            return f"is a Linear whose weight is a {class_name(getattr(linear, 'weight', None))}"
        return f"is a {class_name(linear)}"

    plan = plan_for

    def unfused(self, *args, **kwargs):
        """The forward of timm's class."""
        return self.timm_class.forward(self, *args, **kwargs)

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script: TorchScript is deprecated and can't hold {type(self).__name__}: "
            "script deit_fast.restore(model), or use deit_fast.export"
        )


# What a module is


def kind_of(module: object) -> type:
    """The drop-in class that a module is or does the work of; of other modules their own class."""
    return getattr(type(module), "stands_for", type(module))


def class_name(of: object) -> str:
    """The name of an object's class, qualified by its module if not PyTorch's, timm's or ours."""
    kind = type(of)
    known = kind.__module__.split(".")[0] in ("torch", "timm", "deit_fast")
    return kind.__qualname__ if known else f"{kind.__module__}.{kind.__qualname__}"


def is_identity(module: nn.Module | None) -> bool:
    """Whether a module does nothing: None or nn.Identity."""
    return module is None or type(module) is nn.Identity


def is_exact_gelu(module: nn.Module) -> bool:
    """Whether a module is GELU without the tanh approximation."""
    exact = type(module) is nn.GELU and module.approximate == "none"
    return exact or type(module) is timm.layers.GELU


def is_plain_linear(linear: nn.Module) -> bool:
    """Whether a module is an nn.Linear whose weight is an ordinary parameter.

    It is not if a hook recomputes the weight (pruning), if a parametrization makes it, or if it is
    a tensor subclass with another layout (torchao).
    """
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


# Why the parts of a module don't allow it to be fused


def why_not_parts(module: nn.Module, **kinds: type[Fast]) -> str | None:
    """Why a submodule can't be bypassed as a drop-in module of its kind.

    Args:
        module: the parent.
        kinds: the expected drop-in class of each submodule, by the name of its attribute.

    Returns:
        The reason, or None if all can.
    """
    for name, kind in kinds.items():
        part = getattr(module, name)
        if kind_of(part) is not kind:
            skipped = issubclass(kind, type(part))
            return f"{name} stays with timm" if skipped else f"{name} is a {class_name(part)}"
        why = type(part).why_not(part)
        if why is not None:  # a string whose truth torch.compile does not know
            return f"{name} {why}"
    return None


def why_not_drop_path(module: nn.Module, *names: str) -> str | None:
    """Why one of these attributes is not stochastic depth as a fused operation applies it."""
    for name in names:
        drop = getattr(module, name, None)
        if not is_identity(drop) and type(drop) is not timm.layers.DropPath:
            return f"{name} is a {class_name(drop)}"
    return None


def why_not_dropouts(module: Any, *names: str) -> str | None:
    """Why one of these attributes is not nn.Dropout; `make_plan` sees whether one is active."""
    for name in names:
        drop = getattr(module, name)
        if not is_identity(drop) and type(drop) is not nn.Dropout:
            return f"{name} is a {class_name(drop)}"
    return None


# What a fused operation reads


def weights(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a Linear, for an operation that bypasses it."""
    return linear.weight, linear.bias


def attention_scale(module: Any, head_dim: int) -> float:
    """What timm multiplies the scores by: it reads `scale` only if `fused_attn` is off."""
    return head_dim**-0.5 if module.fused_attn else module.scale
