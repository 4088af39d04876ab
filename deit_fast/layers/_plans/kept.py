"""The plans that a module keeps."""

from typing import Any

from torch import nn


class Plans(dict[str, Any]):
    """The plans of one module, by the name of the method; a copy of the module has none."""

    def __init__(self, owner: int | None = None) -> None:
        super().__init__()
        self.owner = owner
        self.reasons: dict[str, str] = {}  # why calls of a method run in Python
        self.seen: dict[str, Any] = {}  # `guards.Seen` of a method

    def __copy__(self):
        return Plans()

    def __deepcopy__(self, memo):
        return Plans()

    def __reduce__(self):
        return Plans, ()


def plans_of(module: nn.Module) -> Plans:
    """The plans of a module, which it keeps in its `__dict__`."""
    plans = module.__dict__.get("_plans")
    if plans is None or plans.owner != id(module):
        plans = module.__dict__["_plans"] = Plans(id(module))
    return plans


def why_not(module: nn.Module) -> dict[str, str]:
    """Why calls of methods of a module run in Python, by the name of the method."""
    return dict(plans_of(module).reasons)
