"""Versions, the chip, and which implementation serves each operation and why.

Examples:
  deit-fast info              this machine
  deit-fast info --chip 7.0   what a V100 would get
"""

import argparse
import platform
from collections.abc import Iterator
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from deit_fast.kernels import _checks, _chips, _policy, _tuned
from deit_fast.kernels.quantize import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--chip", metavar="X.Y", help="a compute capability, instead of this machine's device"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    console = Console()
    names = ("deit_fast", "torch", "triton", "timm", "torchvision", "safetensors")
    console.print(", ".join(f"{name} {_version(name)}" for name in names))
    console.print(f"Python {platform.python_version()}, CUDA {torch.version.cuda or 'none'}")
    capability, chip = _chip(args.chip)
    console.print(chip)
    console.print(_choices(capability))
    if _policy.excluded():
        console.print(f"excluded: {', '.join(sorted(_policy.excluded()))} (DEIT_FAST_EXCLUDE)")
    if args.chip is None and torch.cuda.is_available():
        for line in _tables(_chips.chip(torch.device("cuda"))):
            console.print(line, soft_wrap=True)
    return 0


def _choices(capability: tuple[int, int] | None) -> Table:
    """What "auto" chooses on a chip of this compute capability; None: a CPU."""
    table = Table("operation", "dtype", "implementation", "why", title="backend auto")
    for op in (*_policy.ROW_OPS, *_policy.MATMUL_OPS):
        if op == "quantize":  # it serves wherever quantized_linear, below, does
            continue
        choices = {d: _policy.choose(op, capability, d) for d in _checks.DTYPES}
        if len(set(choices.values())) == 1:
            table.add_row(op, "any", *choices[torch.float32])
        else:
            table.add_row(op, "fp16, bf16", *choices[torch.float16])
            table.add_row("", "fp32", *choices[torch.float32])
    for i, (name, dtype) in enumerate(FORMATS.items()):  # deit_fast.quantize's
        choice = _policy.choose("quantized_linear", capability, dtype)
        table.add_row("" if i else "quantized_linear", name, *choice)
    folded = capability is not None and _policy.choose("linear", capability, torch.float16)
    if "layer_norm_linear" in _policy.excluded():
        table.add_row("layer_norm_linear", "any", "its parts", "excluded")
    elif folded and folded.implementation == "triton":
        why = "inference: mean, rstd in the GEMM's epilogue"
        table.add_row("layer_norm_linear", "fp16, bf16", "folded", why)
        table.add_row("", "fp32", "its parts", "layer_norm, then linear")
    else:
        table.add_row("layer_norm_linear", "any", "its parts", "layer_norm, then linear")
    parts = "layer_norm_linear, attention, linear; one autograd node in training"
    table.add_row("layer_norm_attention", "any", "its parts", parts)
    parts = "layer_norm_linear, then linear; one autograd node in training"
    table.add_row("layer_norm_mlp", "any", "its parts", parts)
    return table


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return "not installed"


def _tables(chip: _chips.Chip) -> Iterator[str]:
    """A line for each tuned table of this chip, the user's first."""
    for folder in (_tuned.folder(), _tuned.SHIPPED):
        path = folder / f"{_tuned.slug(chip.name)}.json"
        try:
            choices = _tuned.read(path, chip)
        except FileNotFoundError:
            yield f"no tuned table {path}"
        except (OSError, ValueError) as error:
            yield f"{path} is ignored: {error}"
        else:
            yield f"{path}: {sum(map(len, choices.values()))} choices that come before the rules"


def _chip(chip: str | None) -> tuple[tuple[int, int] | None, str]:
    """The compute capability that was asked for or is here (None: a CPU), and a line about it."""
    if chip is not None:
        try:
            major, minor = map(int, chip.split("."))
        except ValueError:
            raise ValueError(
                f"--chip: {chip!r}, expected a compute capability such as 9.0"
            ) from None
        return (major, minor), f"chip: compute capability {major}.{minor} (asked for, not here)"
    if not torch.cuda.is_available():
        return None, "chip: no CUDA device, CPU only"
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return (major, minor), f"chip: {name}, compute capability {major}.{minor}"
