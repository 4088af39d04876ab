"""Names of an operation, wherever its module or package keeps them."""

import sys

import pytest

import deit_fast.kernels
from benchmarks.ahead_of_time.kernel_modules import OPS, KernelModule, kernel_module

PACKAGE = {
    "__init__.py": "from .forward import made_up\n",
    "configs.py": "def configs(): return ['tile']\nSIZES = (1, 2)\nOTHER = [1]\n",
    "forward.py": "from . import configs\nfrom .configs import SIZES\n"
    "def made_up(): ...\ndef _kernel(): ...\nOTHER = [2]\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An operation of several modules, one of which is called like a function in it."""
    for name, text in PACKAGE.items():
        file = tmp_path / "made_up" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(deit_fast.kernels, "__path__", [str(tmp_path)])
    yield KernelModule("made_up")
    for name in [name for name in sys.modules if name.startswith("deit_fast.kernels.made_up")]:
        del sys.modules[name]
    del deit_fast.kernels.made_up


def test_a_package_has_the_names_of_its_modules(package):
    assert package.configs() == ["tile"], "the function, not the module"
    assert package.SIZES == (1, 2) and package._kernel.__name__ == "_kernel"


def test_names_that_no_module_has_or_two_have(package):
    with pytest.raises(AttributeError, match=r"deit_fast.kernels.made_up: no meta"):
        _ = package.meta
    with pytest.raises(AttributeError, match="several different OTHER"):
        _ = package.OTHER


@pytest.mark.parametrize("op", OPS)
def test_every_operation_is_found(op):
    """The module, not the function of that name."""
    assert kernel_module(op)._modules[0].__name__ == f"deit_fast.kernels.{op}"
