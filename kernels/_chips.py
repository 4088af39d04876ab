"""What the device is: facts that rules, tuned tables and error messages go by.

`chip(device)` is the chip that serves a tensor. `simulate_device(chip)` overrides it: rules for a
chip that is not here are computed and tested so, on a CPU. What a chip is given to run is decided in
_policy.py.
"""

import os
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when kernels are decorated


class Chip(NamedTuple):
    """What rules and tuned tables go by."""

    name: str
    capability: tuple[int, int]
    num_sms: int


_INTERPRETED = Chip("Triton's interpreter", (9, 0), 4)  # few, so that small cases get large tiles
_simulated: Chip | None = None


@contextmanager
def simulate_device(chip: Chip):
    """Within it every tensor counts as lying on `chip`, for tests and tables of choices: on a CPU
    the Triton parts then need the interpreter. Not for use from several threads at once."""
    global _simulated
    before, _simulated = _simulated, chip
    try:
        yield
    finally:
        _simulated = before


def is_simulated() -> bool:
    """Whether tensors count as lying on a chip that is not there."""
    return _simulated is not None


@cache
def _cuda_chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    return Chip(found.name, (found.major, found.minor), found.multi_processor_count)


def chip(device: torch.device) -> Chip:
    """The chip whose configurations serve a tensor there; a CPU's kernels are interpreted."""
    if _simulated is not None:
        return _simulated
    if device.type != "cuda":
        return _INTERPRETED
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


@torch.compiler.assume_constant_result
def capability(kind: str, index: int | None) -> tuple[int, int] | None:
    """Compute capability of a device, None for a CPU; a constant under torch.compile."""
    if kind != "cuda" and _simulated is None:
        return None
    return chip(torch.device(kind, index)).capability


def is_datacenter(capability: tuple[int, int]) -> bool:
    """Whether configurations for H100 fit: tensor descriptors, and 227 KB of shared memory a block.
    Chips of compute capability 12.x have the descriptors but 99 KB, and matrix instructions like
    those of 8.x, whose accumulators take more registers."""
    return capability[0] in (9, 10)


# Quantized storage -> the first chip whose tensor cores multiply it, and what to do on the others.
QUANTIZED_FORMATS = {
    torch.float8_e4m3fn: ((8, 9), "fp8 (e4m3) needs compute capability 8.9; int8 needs 8.0"),
    torch.int8: ((8, 0), "Triton multiplies int8 on tensor cores from compute capability 8.0"),
}

# By compute capability, 90 for 9.0: bytes of shared memory that a block may have, and threads that
# an SM holds.
SHARED_MEMORY_LIMIT = {70: 98_304, 75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
THREADS_LIMIT = {70: 2048, 75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048}
