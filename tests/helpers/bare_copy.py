"""A copy of the files that a checkout tracks, on a machine that lacks what can be done without:
LEASE_PYTHON names the interpreter of another environment for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("LEASE_PYTHON", sys.executable)
# modules that are hidden, cores that are simulated
SITE = """
import os, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("rich", "jsonschema", "pyarrow", "torchao"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
os.sched_getaffinity = lambda pid: set(range(16))
os.sched_setaffinity = lambda pid, cores: None
"""


def make(folder: Path) -> Path:
    copy = folder / "copy"
    for name in ("benchmarks", "deit_fast", "kernels", "tests/helpers/stand_in_cuda"):
        ignored = shutil.ignore_patterns(
            "__pycache__", "results", *["kernels"][: name != "kernels"]
        )
        shutil.copytree(ROOT / name, copy / name, ignore=ignored, symlinks=True)
    name = "tests/helpers/rehearse_lease.py"
    shutil.copyfile(ROOT / name, copy / name)
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    return copy


def run(copy: Path, module: str, *arguments) -> subprocess.CompletedProcess:
    """python -m module, in the copy; of its tests only helpers are there."""
    path = os.pathsep.join(map(str, (copy.parent / "site", copy, copy / "tests" / "helpers")))
    env = os.environ | {"PYTHONPATH": path, "HOME": "/proc/none"}
    for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS"):
        env.pop(name, None)
    return subprocess.run(
        [PYTHON, "-m", module, *map(str, arguments)], cwd=copy, env=env, capture_output=True,
        text=True,
    )  # fmt: skip
