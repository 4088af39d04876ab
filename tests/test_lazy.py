"""`import deit_fast` imports no torch, and the package behaves like any other."""

import ast
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from checking import check_compiles, seed

import deit_fast
from deit_fast import _lazy, tune
from deit_fast.kernels import layer_norm

# attributes of the package after `import deit_fast` before it became lazy
SUBMODULES = """_cuda_graph _model_config activation_scales attention_weights checkpoint engine
    heads integrations kernels layers models pretrained quantization stored_model swap""".split()


def python(code, **env):
    """What a new process prints that runs `code`."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_for_types(package):
    """{name: the module it comes from} of the package's `if TYPE_CHECKING:`."""
    (block,) = (
        node for node in ast.parse(inspect.getsource(package)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )  # fmt: skip
    return {alias.name: node.module for node in block.body for alias in node.names}


@pytest.mark.parametrize("package", [deit_fast, tune])
def test_type_checkers_see_the_same_names(package):
    assert imported_for_types(package) == package._homes
    assert sorted(package._homes) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("package", [deit_fast, tune])
def test_every_name_is_there_and_is_imported_once(package):
    for name, home in package._homes.items():
        module = importlib.import_module(f"{package.__name__}.{home}")
        assert getattr(package, name) is getattr(module, name)
        assert name in vars(package)  # the next access is a plain lookup
    namespace = {}
    exec(f"from {package.__name__} import *", namespace)
    assert set(package.__all__) <= set(namespace)


def test_nothing_heavy_is_imported():
    code = """
        import sys, deit_fast, deit_fast.tune
        print(dir(deit_fast), sorted({"torch", "timm", "numpy", "triton"} & set(sys.modules)))
        print(hasattr(deit_fast, "nothing"))
        """
    assert python(code).endswith(" []\nFalse\n")


def test_after_it_torch_brings_the_operators():
    """As a program has them that loads what torch.export saved; timm is not needed for it."""
    code = """
        import sys, importlib, importlib.util, deit_fast
        importlib.reload(deit_fast)
        importlib.util.find_spec("torch")
        assert "torch" not in sys.modules
        import torch
        print(torch.ops.deit_fast.attention.default, "timm" in sys.modules)
        print("exec_module" in vars(torch.__spec__.loader))
        """
    expected = "deit_fast.attention.default False\nFalse\n"
    assert python(code) == expected


@pytest.mark.slow
def test_before_it_torch_brings_the_operators():
    code = "import torch, deit_fast; print(torch.ops.deit_fast.attention.default)"
    assert python(code) == "deit_fast.attention.default\n"


@pytest.mark.slow
def test_modules_are_attributes_without_an_import_of_theirs():
    code = f"""
        import deit_fast
        print([getattr(deit_fast, name).__name__ for name in {SUBMODULES}])
        import deit_fast.export, deit_fast.images
        print(deit_fast.export.__name__, deit_fast.images.__name__)
        """
    names = [f"deit_fast.{name}" for name in SUBMODULES]
    assert python(code) == f"{names}\nexport deit_fast.images\n"


def test_a_module_does_not_take_the_place_of_a_function(monkeypatch):
    module = sys.modules["deit_fast.export"]
    assert inspect.isfunction(deit_fast.export) and deit_fast.export is module.export
    deit_fast.export = module  # as Python does after the first import
    assert deit_fast.export is module.export
    monkeypatch.setattr(deit_fast, "export", len)
    assert deit_fast.export is len


def test_it_is_a_module_like_others():
    assert inspect.ismodule(deit_fast) and inspect.getsourcefile(deit_fast) == deit_fast.__file__
    assert pickle.loads(pickle.dumps(deit_fast)) is deit_fast
    assert pickle.loads(pickle.dumps(deit_fast.InferenceEngine)) is deit_fast.InferenceEngine
    create_model = deit_fast.create_model
    assert importlib.reload(deit_fast).create_model is create_model
    with pytest.raises(AttributeError, match="module 'deit_fast' has no attribute 'create_modle'"):
        deit_fast.create_modle  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'create_modle'"):
        from deit_fast import create_modle  # noqa: F401


def test_a_module_that_fails_to_import_says_so(tmp_path, monkeypatch):
    (tmp_path / "fragile").mkdir()
    (tmp_path / "fragile/__init__.py").write_text("")
    (tmp_path / "fragile/broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("fragile")
    _lazy.attach("fragile", {"broken": ("name",)})
    for name in ("name", "broken"):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            getattr(package, name)
    assert not hasattr(package, "absent") and "absent" not in vars(package)


def test_an_action_follows_an_import_and_once(tmp_path, monkeypatch):
    (tmp_path / "awaited.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    for i in range(2):
        _lazy.when_imported("awaited", lambda i=i: seen.append((i, sys.modules["awaited"].VALUE)))
    import awaited

    assert sorted(seen) == [(0, 1), (1, 1)]
    importlib.reload(awaited)
    assert len(seen) == 2 and not _lazy._FINDER.actions
    _lazy.when_imported("awaited", lambda: seen.append("at once"))
    assert seen[2:] == ["at once"]


def test_compiled_code_finds_an_operation_through_the_package():
    """In one graph, also where the attribute of the package is not yet set."""
    seed(0)
    for name in ("kernels", "swap"):
        vars(deit_fast).pop(name, None)

    def function(x, weight, bias):
        assert deit_fast.swap.SWAPS
        return deit_fast.kernels.layer_norm(x, weight, bias, implementation="torch")

    check_compiles(function, [torch.randn(3, 64), torch.randn(64), torch.randn(64)])
    assert deit_fast.kernels.layer_norm is layer_norm
