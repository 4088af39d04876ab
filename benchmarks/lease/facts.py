"""What the device is, before anything is measured on it."""

import os
import subprocess

import torch

from deit_fast.bench import device
from deit_fast.kernels import _chips

from .context import Context

LEAST_FREE = 20e9  # bytes: DeiT-B's training step at batch 256 takes about that


def step(ctx: Context) -> str:
    """Write the row "facts"; returns them in short.

    Raises:
        RuntimeError: Nothing would be measured on this GPU.
    """
    chip = _chips.chip(ctx.device)
    found = {
        "hardware": device.hardware(ctx.device, wait=False), "slug": device.slug(ctx.device),
        "chip": {
            "name": chip.name, "capability": list(chip.capability), "num_sms": chip.num_sms,
        },
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    if ctx.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(ctx.device)
        expect(chip.name, chip.capability, free)
        properties = torch.cuda.get_device_properties(ctx.device)
        found |= {
            "free_gb": free / 1e9, "total_gb": total / 1e9,
            "l2_mb": properties.L2_cache_size / 1e6,
            "limits": limits(),
        }  # fmt: skip
    ctx.write("facts", **found)
    return f"{chip.name}, {chip.num_sms} SMs, {found['cores']} cores"


def expect(name: str, capability: tuple[int, int], free: float) -> None:
    """Check that the chip can be measured.

    Raises:
        RuntimeError: It has no bf16 tensor cores, or too little memory is free.
    """
    if tuple(capability) < (8, 0):
        have = ".".join(map(str, capability))
        raise RuntimeError(
            f"{name}: compute capability {have} has no bf16 tensor cores, expected 8.0 or newer"
        )
    if free < LEAST_FREE:
        raise RuntimeError(
            f"{name}: {free / 1e9:.1f} GB of GPU memory are free, expected at least "
            f"{LEAST_FREE / 1e9:.0f} GB: is another process using it?"
        )


def limits() -> str | None:
    """Clock and power limits as nvidia-smi prints them; None without it."""
    fields = "clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current,mig.mode.current"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{fields}: {done.stdout.strip().splitlines()[0]}"
