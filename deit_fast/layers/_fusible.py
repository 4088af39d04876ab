"""What the class of a drop-in module declares about its fused forward."""

from collections.abc import Iterator
from typing import Any

from torch import nn


class Fusible:
    """Class attributes that `deit_fast.layers._fusion` reads.

    "Bypassed" means: the fused forward reads the parameters of that submodule and does not call it.
    """

    timm_class: type[Any]  # what the module was before `accelerate`, and becomes again

    has_plan = True  # False for a whole model, whose parts make plans of their own
    linears: tuple[str, ...] = ()  # names of the Linears that are bypassed
    fuses_around_linears = False  # whether the rest stays fused if one of them has to be called
    always_called: tuple[str, ...] = ()  # names of children that are never bypassed
    called_by_parent = False  # whether a fused parent calls it, so that it makes a plan of its own
    rechecks_why_not = False  # whether `why_not` reads more than a Snapshot holds

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Why `module`, of exactly timm's type, can't be computed exactly here; None: it can."""
        return None

    @classmethod
    def why_not_linear(cls, linear: nn.Module) -> str | None:
        """Why one of `linears` has to be called because of what it is; None: it has not."""
        raise NotImplementedError


def timm_class_of(module: nn.Module) -> type[Any]:
    """The class that a module has, or had before `accelerate`."""
    return module.timm_class if isinstance(module, Fusible) else type(module)


def bypassed_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, Any]]:
    """The modules that `module` does not call when it is fused.

    A child with `called_by_parent` is included, and what is inside it is not.

    Args:
        module: a drop-in module.
        prefix: what the yielded names start with.

    Yields:
        (name, module, parent) of each.
    """
    for name, child in module._modules.items():
        if child is None or isinstance(module, Fusible) and name in module.always_called:
            continue
        yield prefix + name, child, module
        if not (isinstance(child, Fusible) and child.called_by_parent):
            yield from bypassed_modules(child, f"{prefix}{name}.")
