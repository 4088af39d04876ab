"""A bare checkout made to run: no installation, nothing written outside the work folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def prepare(work: Path) -> None:
    """Make the checkout runnable, before torch or Triton are imported.

    Caches lie in `work`, whatever the home folder allows, and `deit_fast` with its kernels can be
    imported, in this process and in those that it starts.
    """
    work.mkdir(parents=True, exist_ok=True)
    for variable, folder in {
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",  # set first: Inductor would move Triton's cache
        "DEIT_FAST_CACHE": "deit_fast",
        "HF_HOME": "hub",
        "XDG_CACHE_HOME": "cache",
    }.items():
        os.environ[variable] = str(work / folder)
        (work / folder).mkdir(exist_ok=True)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU must not initialise it
    os.environ["PYTHONUNBUFFERED"] = "1"
    for variable in (
        "DEIT_FAST_BACKEND",
        "DEIT_FAST_EXCLUDE",
        "DEIT_FAST_PLANS",
        "TRITON_INTERPRET",
    ):
        os.environ.pop(variable, None)
    os.environ["DEIT_FAST_COMMIT"] = commit()
    importable(work / "path")


def importable(folder: Path) -> None:
    """Make `import deit_fast` mean this checkout's.

    A checkout has no kernels in the package: a copy in `folder` has them where an installation
    would put them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    copy(folder)
    paths = [str(folder), str(ROOT)]
    sys.path[:0] = paths
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])


def copy(folder: Path) -> None:
    """The package into `folder`, as an installation would lay it out."""
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "deit_fast", folder / "deit_fast", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "deit_fast" / "kernels", ignore=ignored)


def commit() -> str:
    """The checkout's commit, "-dirty" where tracked files differ.

    DEIT_FAST_COMMIT or "unknown" where there is no git or no repository.
    """

    def git(*args):
        try:
            done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "HEAD")
    if not found or git("ls-files", "benchmarks/lease/bare.py") != "benchmarks/lease/bare.py":
        return os.environ.get("DEIT_FAST_COMMIT", "unknown")
    return found + "-dirty" * bool(git("status", "--porcelain", "-uno"))
