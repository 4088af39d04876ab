"""Whether a model is still the one that an engine was built of.

A graph reads the memory that the weights had when it was captured, and runs the modules of then. So
after each replay everything is compared with what it was: `Unchanged` does it in C++ where there is
the library of launch plans, else in flat lists. What differs there may still be harmless:
`ModelCheck` then looks at it again, one thing after another, and says what changed.
"""

from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .kernels import _plan_library
from .layers._snapshot import Snapshot

_Place = tuple[dict[str, Any], str]
_OWN_CALLS = ("forward", "_compiled_call_impl")  # an instance's own
# PyTorch 2.14 has the first, which takes a tenth less time; 2.11 has not
_address = getattr(Tensor, "const_data_ptr", Tensor.data_ptr)


class ModelCheck:
    """A model as it was when an engine was built of it. `require_unchanged` compares it with now.

    The memory of its weights stays reserved as long as this lives, whatever becomes of them: so a
    graph that is replayed before the check reads nothing that was freed, and no other weight can
    come to lie at the same address.

    Args:
        model: the model, in eval mode.
        device: that of its weights.
        dtype: that of its floating-point weights.
        captured: whether graphs or compiled code were made of it. Else only its mode and the device
            and dtype of its first weight are compared.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, captured: bool
    ) -> None:
        self.model, self.device, self.dtype, self.captured = model, device, dtype, captured
        self.modules = list(model.modules())
        owners: list[dict[str, Any]] = [m._parameters for m in self.modules]
        owners += [m._buffers for m in self.modules]
        self.places = [(o, name) for o in owners for name, t in o.items() if t is not None]
        self.addresses = _addresses(self.places)
        self._reserved: list[Tensor] = []
        if captured:
            plain = [t for m in self.modules for t in vars(m).values() if isinstance(t, Tensor)]
            with torch.no_grad():
                self._reserved = [t.detach() for t in (*self.tensors(), *plain)]
            self.heads = getattr(model, "heads", None)
            self.snapshot = Snapshot(self.modules, self.modules)
            self._unchanged = Unchanged(model, self.snapshot, self.places)

    def tensors(self) -> Iterable[Tensor]:
        """The weights and buffers that the model has now, of those that it had."""
        return (t for owner, name in self.places if (t := owner.get(name)) is not None)

    def require_unchanged(self) -> None:
        """Compare.

        Raises:
            RuntimeError: if the model changed in a way that graphs or compiled code don't follow.
        """
        if self.captured and self._unchanged():
            return
        if self.model.training:
            raise RuntimeError(
                "model: in train mode since the engine was built, expected model.eval()"
            )
        if not self.captured:
            self._require_first_weight()
            return
        if _addresses(self.places) != self.addresses:
            raise RuntimeError(
                "model: its weights lie elsewhere than when the engine was built: call "
                "engine.refresh() after replacing or moving them"
            )
        if not self.snapshot.is_current() or getattr(self.model, "heads", None) != self.heads:
            raise RuntimeError(
                "model: it has other modules, heads or hooks than when the engine was built, "
                "and its graphs don't run them: call engine.refresh()"
            )
        if not self._unchanged.never:  # what changed is of no account, and is not looked at again
            self._unchanged = Unchanged(self.model, self.snapshot, self.places)

    def _require_first_weight(self) -> None:
        owner, name = self.places[0]
        if (owner[name].device, owner[name].dtype) != (self.device, self.dtype):
            raise RuntimeError(
                f"model: {owner[name].dtype} on {owner[name].device} now, {self.dtype} on "
                f"{self.device} when the engine was built: call engine.refresh()"
            )


class Unchanged:
    """`unchanged()` is True only if nothing that `ModelCheck` compares has changed.

    Host time matters: this runs at every call. In Python lists are walked through by C code, 10 to
    60 ns a thing: no generators, and no method calls but those of tensors.

    Args:
        model: the model.
        snapshot: of all its modules, up to date.
        places: where its weights are.

    Attributes:
        never: whether the answer is always False: hooks or a `forward` of an instance's own take
            more to compare, and weights that are gone cannot be read.
    """

    def __init__(self, model: nn.Module, snapshot: Snapshot, places: list[_Place]) -> None:
        self.model, self.heads = model, getattr(model, "heads", None)
        self.next_hook_id = RemovableHandle.next_id
        self.weights: list[Any] = [owner.get(name) for owner, name in places]
        gone = any(w is None for w in self.weights)
        self.never = gone or snapshot.has_hooks or any(snapshot.overrides)
        weights = [p["weight"] for p in snapshot.parameters if p.get("weight") is not None]
        self.typed = [*snapshot.modules, *weights]
        self.types = list(map(type, self.typed))
        children = [(c, name) for c in snapshot.children[0] for name in c]
        owners, names = zip(
            *places, *children, *zip(*snapshot.attributes, strict=True), strict=True
        )
        self.owners, self.names = list(owners), list(names)
        self.objects = [owner.get(name) for owner, name in zip(owners, names, strict=True)]
        self.dicts = snapshot.dicts
        self.sized = list({id(owner): owner for owner, _ in (*places, *children)}.values())
        self.sizes = list(map(len, self.sized))
        self.classes, self.forwards = snapshot.classes, snapshot.forwards
        self.guards: Any = None
        if not self.never:
            self.addresses = list(map(_address, self.weights))
            self.dtypes = [w.dtype for w in self.weights]

    def __call__(self) -> bool:
        """Compare."""
        return (
            not self.never
            and self._same_objects()
            and [c.forward for c in self.classes] == self.forwards
            and RemovableHandle.next_id == self.next_hook_id
            and getattr(self.model, "heads", None) == self.heads
            and not self.model.training
        )

    def _same_objects(self):
        if self.guards is None:
            if _plan_library.library() is None:
                return self._same_objects_reference()
            self.guards = _plan_library.guards(self._checks())
        return self.guards.hold()

    def _checks(self):
        yield from (
            (_plan_library.TYPE, *pair, None) for pair in zip(self.typed, self.types, strict=True)
        )
        places = zip(self.owners, self.names, self.objects, strict=True)
        yield from ((_plan_library.ITEM, *place) for place in places)
        sizes = zip(self.sized, self.sizes, strict=True)
        yield from ((_plan_library.SIZE, *pair, None) for pair in sizes)
        yield from ((_plan_library.ABSENT, d, k, None) for d in self.dicts for k in _OWN_CALLS)
        memory = zip(self.weights, self.addresses, self.dtypes, strict=True)
        yield from ((_plan_library.MEMORY, *place) for place in memory)

    def _same_objects_reference(self):
        return (
            list(map(type, self.typed)) == self.types
            and all(map(is_, map(dict.get, self.owners, self.names), self.objects))
            and list(map(len, self.sized)) == self.sizes
            and not any(key in own for own in self.dicts for key in _OWN_CALLS)
            and list(map(_address, self.weights)) == self.addresses
            and [w.dtype for w in self.weights] == self.dtypes
        )


def _addresses(places: list[_Place]) -> list[tuple[int, torch.dtype] | None]:
    weights = (owner.get(name) for owner, name in places)
    return [None if w is None else (w.data_ptr(), w.dtype) for w in weights]
