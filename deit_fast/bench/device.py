"""What the device is: its name, what is installed with it, and what it can compute."""

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from deit_fast.kernels import _plan_library, _policy, _tuned
from deit_fast.kernels.quantize import FORMATS

CLOCK_FIELDS = ("sm_mhz", "mem_mhz", "power_w", "temperature_c")


CPUINFO = Path("/proc/cpuinfo")
# what a CPU's name says beside its maker and model, in the order in which it is taken away
_NOT_THE_MODEL = (
    r"\((R|TM|C)\)",
    r"@.*",
    r"\b\d+-Core\b",
    r"\b(CPU|Processor)\b",
    r"\bw(ith|/) .*",
)


def device_name(device: torch.device) -> str:
    """The chip's name as its maker gives it.

    A CPU that a virtual machine calls by its maker alone has its family and model in brackets.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    said = dict(
        re.findall(r"^(model name|cpu family|model)[ \t]*: (.+?)[ \t]*$", text, re.MULTILINE)
    )
    name = said.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(said) and not re.search(r"\d", name):
        name += f" (family {said['cpu family']}, model {said['model']})"
    return name


def slug(device: torch.device) -> str:
    """The chip's folder under benchmarks/results: "h200", "cpu-intel-xeon-platinum-8481c".

    It is the same on every machine with that chip, and says nothing else of the machine.
    """
    name = device_name(device)
    if device.type == "cuda":
        return _tuned.slug(name)
    for pattern in _NOT_THE_MODEL:
        name = re.sub(pattern, " ", name, flags=re.IGNORECASE)
    return "-".join(["cpu", *re.findall(r"[a-z0-9]+", name.lower())])


def hardware(device: torch.device, wait: bool = True) -> dict[str, str | int | None]:
    """The chip, driver and versions that a results file records.

    Args:
        device: A GPU or the CPU.
        wait: Whether to wait until the library of launch plans is built, up to half a minute, so
            that it is not left to chance which calls run as plans.

    Returns:
        Keys gpu and driver (None on a CPU), plans (of launches; not on a CPU), cuda, cpu, threads,
        python, torch, triton, timm and torchao (None where it is not installed).
    """
    found: dict[str, str | int | None] = {"gpu": None, "driver": None, "cuda": torch.version.cuda}
    if device.type == "cuda":
        if wait:
            _plan_library.wait()
        found |= {"gpu": device_name(device), "driver": _driver(), "plans": _plan_library.status()}
    found |= {"cpu": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    found["python"] = platform.python_version()
    for package in ("torch", "triton", "timm", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return printed.splitlines()[0].strip()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16: a GPU in hardware; a CPU always, if slowly."""
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def l2_bytes(device: torch.device) -> int:
    """Bytes of the cache that must not hold inputs from one call to the next; 32 MiB on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 32 << 20


def quantized_formats(device: torch.device) -> list[str]:
    """The formats, of "fp8" and "int8", whose matmuls the device computes."""
    of = None if device.type == "cpu" else capability(device)
    return [name for name in FORMATS if why_no_quantized_matmul(name, of) is None]


def why_no_quantized_matmul(format: str, of: tuple[int, int] | None) -> str | None:
    """Why a chip has no matmul in a quantized format; None where it has one.

    Args:
        format: "fp8" or "int8".
        of: The chip's compute capability; None for a CPU.
    """
    choice = _policy.choose("quantized_linear", of, FORMATS[format])
    return choice.reason if choice.implementation == "none" else None


def last_sample(path: Path) -> dict[str, float | None]:
    """The last sample of the chip's clocks and power in a log of nvidia-smi.

    Args:
        path: What `nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,
            temperature.gpu --format=csv,noheader,nounits` writes to; it may be missing, or end in
            half a line, which does not count.

    Returns:
        A number for each of CLOCK_FIELDS; None for what the log does not tell.
    """
    unknown: dict[str, float | None] = dict.fromkeys(CLOCK_FIELDS)
    if not path.exists():
        return unknown
    *whole, _ = path.read_text(errors="replace").split("\n")
    if not whole:
        return unknown
    _, *values = [value.strip() for value in whole[-1].split(",")]
    if len(values) != len(CLOCK_FIELDS):
        return unknown
    return {name: _number(value) for name, value in zip(CLOCK_FIELDS, values, strict=True)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None
