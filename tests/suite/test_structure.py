"""Files stay short, and imports go one way: the contracts of import-linter in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels", "deit_fast", "benchmarks", "studies", "examples")
LIMITS = dict.fromkeys(SOURCES, 400) | {"tests": 600}  # lines of a file


def files_of(folder):
    """Python and shell files, once each: deit_fast/kernels may be a link to kernels/."""
    for path in sorted((ROOT / folder).rglob("*")):
        linked = any(parent.is_symlink() for parent in (path, *path.parents))
        if path.suffix in (".py", ".sh") and not linked and "results" not in path.parts:
            yield path


def too_long(limits):
    return [
        f"{path.relative_to(ROOT)}: {lines} lines, expected at most {limit}"
        for folder, limit in limits.items()
        for path in files_of(folder)
        if (lines := len(path.read_text().splitlines())) > limit
    ]


def test_no_file_is_long():
    assert not too_long(LIMITS)
    found = too_long(dict.fromkeys(LIMITS, 10))
    assert any("kernels/layer_norm.py" in line for line in found), "files are found"


def lint(folder, config):
    """import-linter on a copy of the tree, made of links, in which the kernels lie in the package
    as an installation has them."""
    (folder / "deit_fast").mkdir()
    for path in (ROOT / "deit_fast").iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (folder / "deit_fast" / path.name).symlink_to(path)
    (folder / "deit_fast" / "kernels").symlink_to(ROOT / "kernels")
    for name in ("benchmarks", "studies"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "pyproject.toml").write_text(config)
    code = "from importlinter.cli import lint_imports as lint; "
    code += "raise SystemExit(lint(no_cache=True, no_logo=True))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip


def test_kernels_know_no_modules():
    """... which the contracts cannot say: torch.nn is there for its functions and Parameter."""
    modules = [f for f in files_of("kernels") if "nn.Module" in f.read_text()]
    assert not modules


CONFIG = (ROOT / "pyproject.toml").read_text()


def test_imports_go_one_way(tmp_path):
    done = lint(tmp_path, CONFIG)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


def test_an_import_upwards_is_found(tmp_path):
    """Contracts that are turned around break: they look at real imports."""
    turned = """
[tool.importlinter]
root_packages = ["deit_fast"]

[[tool.importlinter.contracts]]
name = "turned around"
type = "forbidden"
source_modules = ["deit_fast.layers"]
forbidden_modules = ["deit_fast.kernels"]
"""
    done = lint(tmp_path, turned)
    assert done.returncode == 1 and "deit_fast.layers.attention -> deit_fast.kernels" in done.stdout
