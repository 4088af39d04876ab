"""What `deit-fast info` does; its options are in parsers/info.py."""

import argparse
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deit_fast.bench.device import hardware
from deit_fast.kernels import _checks, _chips, _plan_library, _policy, _tuned
from deit_fast.kernels.quantize import FORMATS

from . import _json
from ._next_steps import extras, next_steps
from .parsers import version_of

PACKAGES = ("deit_fast", "torch", "triton", "timm", "torchvision", "safetensors")
COLUMNS = ("operation", "dtype", "implementation", "why")
ENVIRONMENT = ("DEIT_FAST_BACKEND", "DEIT_FAST_EXCLUDE", "DEIT_FAST_PLANS", "TRITON_INTERPRET")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    with _json.output(args.json) as write:
        found = collect(args.chip)
        _show(found, args.chip is None and torch.cuda.is_available())
        write(found)
    return 0


def collect(chip: str | None = None) -> dict[str, Any]:
    """What is installed, what the chip is and what serves there, as JSON has it: no paths.

    Args:
        chip: A compute capability instead of this machine's.

    Raises:
        ValueError: It is none.
    """
    capability = _capability(chip)
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {"versions": {name: version_of(name) for name in PACKAGES}}
    machine = hardware(torch.device("cuda" if cuda else "cpu"))
    found |= {name: machine[name] for name in ("python", "cuda", "gpu", "driver", "cpu", "threads")}
    found |= {
        "os": platform.platform(),
        "capability": capability,
        "asked": chip is not None,
        "operations": [dict(zip(COLUMNS, row, strict=True)) for row in _choices(capability)],
        "plans": _plan_library.status(),
        "excluded": sorted(_policy.excluded()),
        "tuned": _tables(_chips.chip(torch.device("cuda"))) if cuda else [],
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "extras": extras(),
    }
    has_driver = shutil.which("nvidia-smi") is not None
    return found | {"next": [] if chip else next_steps(found, has_driver)}


def _show(found: dict[str, Any], paths: bool) -> None:
    console = Console()
    console.print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    console.print(f"Python {found['python']}, CUDA {found['cuda'] or 'none'}, {found['os']}")
    capability = found["capability"] and ".".join(map(str, found["capability"]))
    if found["asked"]:
        console.print(f"chip: compute capability {capability} (asked for, not here)")
    elif found["gpu"] is None:
        console.print(f"chip: no CUDA device, CPU only ({found['cpu']})", markup=False)
    else:
        console.print(f"chip: {found['gpu']}, compute capability {capability}")
        console.print(f"driver: {found['driver'] or 'unknown'}")
    table = Table(*COLUMNS, title="backend auto")
    shown = ""
    for row in found["operations"]:
        cells = list(row.values())
        table.add_row("" if cells[0] == shown else cells[0], *cells[1:])
        shown = cells[0]
    console.print(table)
    console.print(f"launch plans: {found['plans']}", soft_wrap=True, markup=False, highlight=False)
    if found["excluded"]:
        console.print(f"excluded: {', '.join(found['excluded'])} (DEIT_FAST_EXCLUDE)")
    if paths:
        for one, folder in zip(found["tuned"], (_tuned.folder(), _tuned.SHIPPED), strict=True):
            console.print(_line(one, folder), soft_wrap=True, markup=False)
    if found["next"]:
        console.print("\nNext:")
    for step in found["next"]:
        console.print(f"  {step}", soft_wrap=True, markup=False, highlight=False)


def _choices(capability: tuple[int, int] | None) -> list[tuple[str, str, str, str]]:
    """What "auto" chooses on a chip of this compute capability (None: a CPU), as `COLUMNS`."""
    rows: list[tuple[str, str, str, str]] = []
    for op in (*_policy.ROW_OPS, *_policy.MATMUL_OPS):
        if op == "quantize":  # it serves wherever quantized_linear, below, does
            continue
        choices = {d: _policy.choose(op, capability, d) for d in _checks.DTYPES}
        if len(set(choices.values())) == 1:
            rows.append((op, "any", *choices[torch.float32]))
        else:
            rows.append((op, "fp16, bf16", *choices[torch.float16]))
            rows.append((op, "fp32", *choices[torch.float32]))
    for name, dtype in FORMATS.items():  # deit_fast.quantize's
        rows.append(
            ("quantized_linear", name, *_policy.choose("quantized_linear", capability, dtype))
        )
    folded = capability is not None and _policy.choose("linear", capability, torch.float16)
    op, parts = "layer_norm_linear", "its parts"
    if op in _policy.excluded():
        rows.append((op, "any", parts, "excluded"))
    elif folded and folded.implementation == "triton":
        why = "inference: mean, rstd in the GEMM's epilogue"
        rows.append((op, "fp16, bf16", "folded", why))
        rows.append((op, "fp32", parts, "layer_norm, then linear"))
    else:
        rows.append((op, "any", parts, "layer_norm, then linear"))
    why = "layer_norm_linear, attention, linear; one autograd node in training"
    rows.append(("layer_norm_attention", "any", parts, why))
    why = "layer_norm_linear, then linear; one autograd node in training"
    rows.append(("layer_norm_mlp", "any", parts, why))
    return rows


def _tables(chip: _chips.Chip) -> list[dict[str, Any]]:
    """What the tuned tables of this chip hold, the user's first."""
    found = []
    for whose, folder in (("user's", _tuned.folder()), ("shipped", _tuned.SHIPPED)):
        path = folder / f"{_tuned.slug(chip.name)}.json"
        table: dict[str, Any] = {"whose": whose, "file": path.name, "choices": 0, "problem": None}
        try:
            table["choices"] = sum(map(len, _tuned.read(path, chip).values()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            table["problem"] = str(error).replace(str(folder), "...")
        found.append(table)
    return found


def _line(table: dict[str, Any], folder: Path) -> str:
    path = folder / table["file"]
    if table["problem"]:
        return f"{path} is ignored: {table['problem']}"
    if not table["choices"]:
        return f"no tuned table {path}"
    return f"{path}: {table['choices']} choices that come before the rules"


def _capability(chip: str | None) -> tuple[int, int] | None:
    """The compute capability that was asked for or is here; None: a CPU."""
    if chip is not None:
        try:
            major, minor = map(int, chip.split("."))
        except ValueError:
            raise ValueError(
                f"--chip: {chip!r}, expected a compute capability such as 9.0"
            ) from None
        return major, minor
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
