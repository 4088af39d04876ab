"""Errors as notes of a row, and which of them lose the device."""

import torch

LOST = "device lost: "  # begins the note of a row after which the process can measure nothing
_LOST = (
    "triton error [cuda]", "cuda error", "illegal memory access", "misaligned address",
    "unspecified launch failure", "execution_failed", "execution failed", "device-side assert",
    "illegal instruction", "ecc error",
)  # fmt: skip
_USABLE = ("out of memory", "out of resource", "invalid configuration", "no kernel image")


def device_is_lost(error: BaseException) -> bool:
    """Whether the process can no longer use its device after this error.

    Every later call fails then, with an error that blames the wrong call. Another process can use
    the device.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    text = str(error).lower()
    return (
        isinstance(error, RuntimeError)
        and any(part in text for part in _LOST)
        and not any(part in text for part in _USABLE)
    )


def reason(error: Exception) -> str:
    """An exception as one line: its class and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def failure_note(error: Exception) -> str:
    """The note of a row that failed: the reason, after LOST where the device is lost."""
    return LOST * device_is_lost(error) + reason(error)
