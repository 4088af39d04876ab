"""PyTorch's own operators without their work: what a call of them costs the host, and no more.

    operators = Operators()
    with operators.idle():
        model(images)           garbage, as fast as Python, dispatcher and autograd allow
    operators.calls             how many of them were called

Structured operators keep PyTorch's shape checks, and all of them their allocations. What a CUDA
tensor's call does more is left out: the choice of a cuBLAS or cuDNN algorithm, and the launch.
"""

import ctypes
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import HERE, compiled, kept

# with a kernel for the CPU that does what it does for a GPU: memory and views
FREE = frozenset(
    f"aten::{name}"
    for name in (
        "as_strided", "empty.memory_format", "empty_strided", "resize_", "set_.source_Storage",
        "unfold", "view", "_reshape_alias",
    )
)  # fmt: skip


def build(folder: Path) -> Path:
    """Compile the library into `folder`, which takes some ten seconds; returns its path."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0]
    at = Path(torch.__file__).parent
    options = [f"-I{at / part}" for part in ("include", "include/torch/csrc/api/include")]
    options += [f"-L{at / 'lib'}", "-lc10", "-ltorch_cpu", "-std=c++20"]
    return compiled(HERE / "operators.cpp", folder / "operators.so", compiler, *options)


class Operators:
    """The library. folder: for it, kept between processes; default: one in the temporary folder."""

    def __init__(self, folder: Path | None = None):
        folder = folder or kept(HERE / "operators.cpp", torch.__version__)
        self.library = ctypes.PyDLL(str(build(folder)))
        self.library.operators_calls.restype = ctypes.c_long
        self.library.operators_seen.restype = ctypes.c_char_p

    @property
    def calls(self) -> int:
        """Of the operators without their work: each would launch something on a GPU."""
        return self.library.operators_calls()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Within it they do nothing to CPU tensors, in this process."""
        self.library.operators_install()
        try:
            yield
        finally:
            self.library.operators_remove()

    def working(self, call: Callable) -> list[str]:
        """The operators that compute in `call()`, which runs: within `idle()`, those that it does
        not know."""
        self.library.operators_watch()
        try:
            call()
        finally:
            seen = self.library.operators_seen().decode().split()
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return [
            name for name in seen
            if name.startswith("aten::") and name not in FREE and has_kernel(name, "CPU")
            and "stand_in_cuda/operators.cpp" not in torch._C._dispatch_dump(name)
        ]  # fmt: skip
