"""The library that runs launch plans: built from csrc/ on first use, kept in the user's cache.

It needs a C++ compiler and nothing else: PyTorch ships its headers, Triton the CUDA driver's. The
build takes about half a minute and runs in the background; calls run in Python until it is done.
The environment variable DEIT_FAST_PLANS says otherwise:

    0    no plans: every call runs in Python
    1    the first call waits for the build, and raises RuntimeError where it fails
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SOURCE = Path(__file__).parent / "csrc"
WANTED = os.environ.get("DEIT_FAST_PLANS", "")
if WANTED not in ("", "0", "1"):
    raise ValueError(f"DEIT_FAST_PLANS: {WANTED!r}, expected 0, 1 or nothing")

TYPE, CLASS, ITEM, VALUE, SIZE, MEMORY, ABSENT = range(7)  # kinds of checks: csrc/guards.h

loaded: Any = None  # the module
_why_not: str | None = "DEIT_FAST_PLANS is 0" if WANTED == "0" else None
_lock = threading.Lock()
_build: threading.Thread | None = None


def library() -> Any:
    """The library, or None while it is built or where it cannot be had; the first call builds it.

    Raises:
        RuntimeError: It cannot be built, and DEIT_FAST_PLANS is 1.
    """
    if loaded is not None or _why_not is not None:
        if loaded is None and WANTED == "1":
            raise RuntimeError(f"DEIT_FAST_PLANS is 1, but there are no launch plans: {_why_not}")
        return loaded
    _start()
    return wait() if WANTED == "1" else loaded


def wait() -> Any:
    """As `library`, when it is built."""
    _start()
    if _build is not None:
        _build.join()
    return library()


def guards(checks: Iterable[tuple]) -> Any:
    """`Guards` of csrc/guards.h, once there is the library: `hold()` says whether all hold.

    Args:
        checks: each a kind and three things; the last ones may be None.
    """
    return loaded.Guards(list(checks))


def changed() -> None:
    """To be called when a setting of this package changes: no plan made before is used again."""
    if loaded is not None:
        loaded.changed()


def leave_out(why: str) -> None:
    """From here on every call of this process runs in Python."""
    global loaded, _why_not
    loaded, _why_not = None, why


def status() -> str:
    """One line for people: whether calls run as launch plans, and if not, why."""
    if loaded is not None:
        return "ready"
    if _why_not is not None:
        return f"none: {_why_not}"
    if _build is not None:
        return "being built"
    why = why_not_buildable()
    if why is not None and not why.startswith("there is no C++"):
        return f"none: {why}"
    if path_of_build().exists():
        return "built"
    return f"none: {why}" if why else "to be built at the first call on a GPU"


def _start() -> None:
    global _build
    with _lock:
        if _build is None and loaded is None and _why_not is None:
            _build = threading.Thread(target=_load, name="deit_fast launch plans", daemon=True)
            _build.start()


def _load() -> None:
    global loaded, _why_not
    try:
        loaded = load(build())
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or ["no message"]
        _why_not = f"{error.cmd[0]} failed: {last[0]}"
    except (OSError, ImportError, RuntimeError) as error:
        _why_not = str(error)


def why_not_buildable() -> str | None:
    """Why the library cannot be built here; None: it can."""
    if not sys.platform.startswith("linux"):
        return "plans need Linux"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if shutil.which(_compiler()) is None:
        return f"there is no C++ compiler {_compiler()!r}; install one, or name one in CXX"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers are not installed (Debian: python3-dev)"
    return None


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def command(path: Path, *options: str) -> list[str]:
    """The command that builds the library into `path`."""
    torch_at = Path(torch.__file__).parent
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    include = [torch_at / "include", torch_at / "include/torch/csrc/api/include",
               Path(spec.origin).parent / "backends/nvidia/include",
               sysconfig.get_paths()["include"]]  # fmt: skip
    return [
        _compiler(), "-shared", "-fPIC", "-O2", "-std=c++20", "-fvisibility=hidden", *options,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-DTORCH_EXTENSION_NAME=launch_plan", *(f"-isystem{folder}" for folder in include),
        str(SOURCE / "launch_plan.cpp"), "-o", str(path), f"-L{torch_at / 'lib'}",
        "-lc10", "-ltorch_cpu", "-ltorch_python",
    ]  # fmt: skip


def cache_folder() -> Path:
    """What this package keeps: DEIT_FAST_CACHE, or deit_fast in the user's cache directory."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DEIT_FAST_CACHE") or Path(cache_home, "deit_fast"))


def path_of_build() -> Path:
    """Where the library is kept, for these sources and these versions."""
    import triton

    digest = hashlib.sha256()
    for source in sorted(SOURCE.iterdir()):
        digest.update(source.read_bytes())
    digest.update("\n".join(command(Path("-"))).encode())
    versions = f"torch{torch.__version__}-triton{triton.__version__}"
    tag = f"{platform.machine()}-{sys.implementation.cache_tag}-{versions}"
    return cache_folder() / "plans" / f"launch_plan-{tag}-{digest.hexdigest()[:12]}.so"


def build() -> Path:
    """Build the library unless it is there; returns its path.

    Raises:
        RuntimeError: Something that the build needs is missing.
        subprocess.CalledProcessError: The compiler failed.
        OSError: The folder cannot be written.
    """
    path = path_of_build()
    if path.exists():
        return path
    why = why_not_buildable()
    if why is not None:
        raise RuntimeError(why)
    import fcntl  # of Linux

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a node: one builds, the others wait
        try:
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    part = Path(folder, path.name)
                    subprocess.run(command(part), check=True, capture_output=True, text=True)
                    part.replace(path)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was forked meanwhile has it open
    return path


def load(path: Path) -> ModuleType:
    """The library at `path` as a module.

    Raises:
        ImportError: It does not load.
    """
    spec = importlib.util.spec_from_file_location("launch_plan", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
