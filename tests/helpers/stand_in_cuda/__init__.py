"""A GPU that is not there: Triton specialises, compiles, loads and launches, and nothing runs.

`install()` builds a small library that takes the driver's place (cuda.c) and makes a driver active
whose device is the chip that was asked for. CPU tensors count as lying on it: their kernels are
launched, every launch is checked against the chip and written down, and results stay what the
memory held. For a process of its own, without TRITON_INTERPRET, before anything is launched.

    gpu = stand_in_cuda.install((9, 0))
    deit_fast.kernels.linear(x, weight)
    gpu.launches()      what was launched since the last `forget()`
    gpu.reasons()       what the chip would have refused; Triton has raised as well
"""

import ctypes
import hashlib
import os
import subprocess
import sysconfig
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from deit_fast.kernels import _chips

HERE = Path(__file__).parent
# capability -> SMs, bytes of shared memory that a block may ask for
CHIPS = {
    (7, 0): (80, 98_304), (7, 5): (40, 65_536), (8, 0): (108, 166_912), (8, 6): (84, 101_376),
    (8, 9): (128, 101_376), (9, 0): (132, 232_448), (10, 0): (148, 232_448),
    (12, 0): (170, 101_376),
}  # fmt: skip
_for_good = ExitStack()  # of contexts that last as long as the process
NAMES = {(9, 0): "NVIDIA H100 80GB HBM3"}


class _Launch(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 192), ("grid", ctypes.c_uint * 3), ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint), ("cluster", ctypes.c_uint), ("registers", ctypes.c_int),
        ("spills", ctypes.c_int), ("maps", ctypes.c_int), ("text", ctypes.c_char_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: kernel, grid, threads a block, bytes of shared memory, blocks a cluster,
    registers a thread and bytes of local memory, as the cubin has them."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cluster: int
    registers: int
    spills: int


class _Driver(nvidia.CudaDriver):
    def __init__(self, capability):
        super().__init__()
        self.get_device_capability = lambda device=0: capability
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device=None: 0
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return self._target

    def get_active_torch_device(self):
        return torch.device("cpu")


class StandIn:
    """The library, and what it has seen."""

    def __init__(self, library: ctypes.CDLL, chip: _chips.Chip, shared: int):
        self.library, self.chip, self.shared_limit = library, chip, shared
        library.stand_in_launch.restype = ctypes.POINTER(_Launch)
        library.stand_in_reason.restype = ctypes.c_char_p

    def launches(self) -> list[Launch]:
        found = []
        for i in range(self.library.stand_in_launches()):
            one = self.library.stand_in_launch(i).contents
            found.append(
                Launch(
                    one.name.decode(), tuple(one.grid), one.threads, one.shared, one.cluster,
                    one.registers, one.spills,
                )
            )  # fmt: skip
        return found

    def keep(self, where: Any) -> None:
        """Keep all that launches are given from now on: see `texts` and memory.cpp's where."""
        self.library.stand_in_keep(where)

    def texts(self) -> list[str]:
        """The launches since the last `forget()`: functions, configurations, attributes, and each
        parameter as the driver reads it."""
        every = range(self.library.stand_in_launches())
        return [self.library.stand_in_launch(i).contents.text.decode() for i in every]

    def loads(self) -> int:
        """Modules loaded since the process began: one for each kernel that was compiled."""
        return self.library.stand_in_loads()

    def maps(self) -> int:
        """Tensor maps encoded since the last `forget()`."""
        return self.library.stand_in_maps()

    def reasons(self) -> list[str]:
        count = self.library.stand_in_reasons()
        return [self.library.stand_in_reason(i).decode() for i in range(count)]

    def sleep(self, microseconds: int) -> None:
        """Every launch takes so long from now on."""
        self.library.stand_in_sleep(microseconds)

    def forget(self) -> None:
        self.library.stand_in_forget()


def build(folder: Path) -> Path:
    """Compile the library into `folder`; returns its path."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC").split()[0]
    options = ["-Wl,-soname,libcuda.so.1", f"-I{nvidia.include_dirs[0]}"]
    return compiled(HERE / "cuda.c", folder / "libcuda.so.1", compiler, *options)


def kept(source: Path, version: str) -> Path:
    """A temporary folder for what is compiled of `source` for that version; checkouts differ."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"stand_in_{source.stem}-{version}-{digest}"


def compiled(source: Path, path: Path, compiler: str, *options: str) -> Path:
    """`path`, the shared library that the compiler makes of `source`, if that is newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
        part = path.with_name(f"{path.name}.{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(part), *options]
        subprocess.run(command, check=True)
        part.replace(path)  # several processes may build it at once
    return path


def install(
    capability: tuple[int, int] = (9, 0), folder: Path | None = None, sms: int | None = None
) -> StandIn:
    """Make the chip of that compute capability this process's GPU, for good. folder: for the
    library, kept between processes; default: one in the temporary folder. sms: how many SMs it has,
    instead of all: with few of them, small batches get the tiles of large ones."""
    if _chips.INTERPRET:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    path = build(folder or kept(HERE / "cuda.c", triton.__version__))
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # found loaded, by its soname
    every, shared = CHIPS[capability]
    sms = sms or every
    library.stand_in_chip(*capability, sms, shared)
    triton.runtime.driver.set_active(_Driver(capability))
    name = NAMES.get(capability, f"stand-in {capability[0]}.{capability[1]}")
    chip = _chips.Chip(name, capability, sms)
    _for_good.enter_context(_chips.simulate_device(chip))
    return StandIn(library, chip, shared)
