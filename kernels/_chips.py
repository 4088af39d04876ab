"""What the device is: facts that rules, tuned tables and error messages go by.

`chip(device)` is the chip that serves a tensor. `simulate_device(chip)` overrides it: the rules for
a chip that is not here are computed and tested so, on a CPU. What a chip is given to run is decided
in _policy.py.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from . import _plan_library

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when kernels are decorated

# Compute capability -> shared memory that one block may ask for, in bytes, and threads that an SM
# holds at once.
_LIMITS = {
    70: (96 * 1024, 2048),  # V100
    75: (64 * 1024, 1024),  # T4
    80: (163 * 1024, 2048),  # A100
    86: (99 * 1024, 1536),  # A10
    89: (99 * 1024, 1536),  # L4
    90: (227 * 1024, 2048),  # H100
}
SHARED_MEMORY_LIMIT = {arch: shared_memory for arch, (shared_memory, _) in _LIMITS.items()}
THREADS_LIMIT = {arch: threads for arch, (_, threads) in _LIMITS.items()}

# Quantized dtype -> the first chip whose tensor cores multiply it, and the message on older ones.
QUANTIZED_FORMATS = {
    torch.float8_e4m3fn: ((8, 9), "fp8 (e4m3) needs compute capability 8.9; int8 needs 8.0"),
    torch.int8: ((8, 0), "Triton multiplies int8 on tensor cores from compute capability 8.0"),
}


class Chip(NamedTuple):
    """A GPU model, as rules and tuned tables see it."""

    name: str
    capability: tuple[int, int]
    num_sms: int


_INTERPRETED = Chip("Triton's interpreter", (9, 0), 4)  # few SMs: small cases get large tiles too
_simulated: Chip | None = None


@contextmanager
def simulate_device(chip: Chip) -> Iterator[None]:
    """Context in which every tensor counts as lying on `chip`.

    For tests, and for tables of choices. On a CPU the Triton kernels then need the interpreter. The
    override is global: not for several threads at once.
    """
    global _simulated
    before, _simulated = _simulated, chip
    _plan_library.changed()
    try:
        yield
    finally:
        _simulated = before
        _plan_library.changed()


def is_simulated() -> bool:
    """Whether `simulate_device` is active."""
    return _simulated is not None


@cache
def _cuda_chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    return Chip(found.name, (found.major, found.minor), found.multi_processor_count)


def chip(device: torch.device) -> Chip:
    """The chip whose configurations serve a tensor on `device`; a CPU's kernels are interpreted."""
    if _simulated is not None:
        return _simulated
    if device.type != "cuda":
        return _INTERPRETED
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


@torch.compiler.assume_constant_result
def capability(kind: str, index: int | None) -> tuple[int, int] | None:
    """Compute capability of a device, None for a CPU; a constant under torch.compile.

    Args:
        kind: Device type, such as "cuda".
        index: Device index; None is the current device.
    """
    if kind != "cuda" and _simulated is None:
        return None
    return chip(torch.device(kind, index)).capability  # type: ignore[arg-type]  # stubs lack None


def is_datacenter(capability: tuple[int, int]) -> bool:
    """Whether the configurations for H100 fit: TMA descriptors, 227 KB of shared memory per block.

    Chips of compute capability 12.x have the descriptors but 99 KB, and matrix instructions like
    those of 8.x, whose accumulators take more registers.
    """
    return capability[0] in (9, 10)
