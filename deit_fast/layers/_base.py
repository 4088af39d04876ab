"""What the drop-in modules share."""

import timm.layers
from torch import nn

from ._bypass import Bypasses, class_name, is_plain, plan_of

BACKENDS = ("auto", "triton", "torch")


class Fast(Bypasses):
    """Mixin of every drop-in module.

    `backend` is handed to each operation as its `implementation`: "auto" (Triton on a CUDA device,
    as `deit_fast.kernels._policy.choose` says; PyTorch on a CPU), "triton" or "torch". What is
    fused is `plan`'s to say, at every call: see `_bypass`.
    """

    backend = "auto"
    timm_class: type  # what the module was, and becomes again
    stands_for: type  # the class itself, or the one that it does all the work of

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        shards = any(c.__module__.startswith("torch.distributed.fsdp") for c in cls.__bases__)
        if not shards:  # FSDP2 makes a subclass of what it wraps
            cls.stands_for = cls.__dict__.get("stands_for", cls)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why `module`, of exactly timm's type, can't be computed exactly here; None: it can."""
        return None

    @classmethod
    def why_not_linear(cls, linear: nn.Module) -> str | None:
        """Why one of `linears` has to be called."""
        if is_plain(linear):
            return None
        if type(linear) is nn.Linear:
            return f"is a Linear whose weight is a {class_name(getattr(linear, 'weight', None))}"
        return f"is a {class_name(linear)}"

    plan = plan_of

    def unfused(self, *args, **kwargs):
        """timm's own forward."""
        return self.timm_class.forward(self, *args, **kwargs)

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script: TorchScript is deprecated and can't hold {type(self).__name__}: "
            "script deit_fast.restore(model), or use deit_fast.export"
        )


def kind_of(module: nn.Module | None) -> type:
    """The drop-in class a module has the parts of; any other module's own class."""
    return getattr(type(module), "stands_for", type(module))


def is_identity(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


def is_exact_gelu(module: nn.Module) -> bool:
    exact = type(module) is nn.GELU and module.approximate == "none"
    return exact or type(module) is timm.layers.GELU


def why_not_parts(module: nn.Module, **kinds: type) -> str | None:
    """Why a part of `module`, by the name of its attribute, can't be bypassed as a drop-in module
    of that kind; None: all can."""
    for name, kind in kinds.items():
        part = getattr(module, name)
        if kind_of(part) is not kind:
            left = issubclass(kind, type(part))
            return f"{name} stays with timm" if left else f"{name} is a {class_name(part)}"
        why = type(part).why_not(part)
        if why is not None:  # a string whose truth torch.compile does not know
            return f"{name} {why}"
    return None


def why_not_drop_path(module: nn.Module, *names: str) -> str | None:
    for name in names:
        drop = getattr(module, name, None)
        if not is_identity(drop) and type(drop) is not timm.layers.DropPath:
            return f"{name} is a {class_name(drop)}"
    return None


def why_not_dropouts(module: nn.Module, *names: str) -> str | None:
    """Whether one drops numbers now is `_bypass.examine`'s to see."""
    for name in names:
        drop = getattr(module, name)
        if not is_identity(drop) and type(drop) is not nn.Dropout:
            return f"{name} is a {class_name(drop)}"
    return None


def weights(linear: nn.Module):
    """weight and bias of a Linear that a fused operation reads without calling the module."""
    return linear.weight, linear.bias


def attention_scale(module: nn.Module, head_dim: int) -> float:
    """What timm multiplies the scores by: `scale` is read where `fused_attn` is off."""
    return head_dim**-0.5 if module.fused_attn else module.scale
