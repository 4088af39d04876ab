"""What lets a package be imported in no time: its names come from their modules at first use."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package whose public names are imported at first use, and then are attributes like others.

    A module is what it stays, with all a module's ways; `attach` makes it one of these.
    """

    _homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if home := self._homes.get(name):
            value = getattr(importlib.import_module(f"{self.__name__}.{home}"), name)
        elif not name.startswith("__") and importlib.util.find_spec(f"{self.__name__}.{name}"):
            value = importlib.import_module(f"{self.__name__}.{name}")
        else:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets each submodule here when it was imported: not in the place of a function
        if isinstance(value, ModuleType) and self._homes.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted(self.__dict__.keys() | self._homes.keys())

    def __reduce__(self) -> tuple:
        return importlib.import_module, (self.__name__,)  # as cloudpickle pickles a module


def attach(package: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """Make a package lazy.

    Args:
        package: Its `__name__`.
        names: {submodule: the public names that come from it}.
    """
    module = sys.modules[package]
    homes = {name: home for home, some in names.items() for name in some}
    module.__dict__["_homes"] = homes
    module.__class__ = LazyPackage


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Call `action` once the module of that name was imported: at once where it already was."""
    if name in sys.modules:
        action()
        return
    _FINDER.actions.setdefault(name, []).append(action)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder:
    """Finds modules as the other finders do, and acts when they were executed."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[], object]]] = {}

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name not in self.actions:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                if hasattr(spec.loader, "exec_module"):
                    self._extend(name, spec.loader)
                return spec
        return None

    def _extend(self, name: str, loader: Any) -> None:
        exec_module = loader.exec_module

        def exec_and_act(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # the class's again
            exec_module(module)
            actions = self.actions.pop(name, [])
            if not self.actions and self in sys.meta_path:
                sys.meta_path.remove(self)
            for action in actions:
                action()

        loader.exec_module = exec_and_act


_FINDER: Any = _Finder()
