"""Finds the kernels and the rules of an operation by name.

They are in a module of `deit_fast.kernels`, or in the submodules of a package.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType

OPS = (
    "layer_norm", "linear", "quantize", "quantized_linear", "layer_norm_linear", "layer_norm_mlp",
    "attention", "patch_embed", "classifier", "distillation_loss", "window_attention", "conv_norm",
    "sparse_cross_entropy", "talking_heads", "column_sums",
)  # fmt: skip


class KernelModule:
    """The names of one operation as attributes: kernels, configurations, launch settings.

    Args:
        op: Name of a module or package of `deit_fast.kernels`. It is imported as a module because
            the public function of the same name hides it as an attribute of the package.
    """

    def __init__(self, op: str):
        self._op = op
        module = importlib.import_module(f"deit_fast.kernels.{op}")
        submodules = pkgutil.iter_modules(getattr(module, "__path__", ()))
        names = [f"{module.__name__}.{found.name}" for found in submodules]
        self._modules = [module, *map(importlib.import_module, names)]

    def __getattr__(self, name: str):
        """The one object of that name.

        Raises:
            AttributeError: No module has the name, or two of them mean different things by it.
        """
        found = [vars(module)[name] for module in self._modules if name in vars(module)]
        found = [value for value in found if not isinstance(value, ModuleType)]
        if not found:
            raise AttributeError(f"deit_fast.kernels.{self._op}: no {name}")
        if any(value is not found[0] for value in found):
            raise AttributeError(f"deit_fast.kernels.{self._op}: several different {name}")
        return found[0]


@cache
def kernel_module(op: str) -> KernelModule:
    """The names of an operation; of a package, those of all its submodules."""
    return KernelModule(op)
