"""Versions, the chip, and which implementation serves each operation and why.

examples:
  deit-fast info              this machine
  deit-fast info --chip 7.0   what a V100 would get
"""

import platform
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from deit_fast.kernels import _runtime


def add_arguments(parser):
    parser.add_argument(
        "--chip", metavar="X.Y", help="a compute capability, instead of this machine's device"
    )


def run(args) -> int:
    console = Console()
    names = ("deit_fast", "torch", "triton", "timm", "torchvision", "safetensors")
    console.print(", ".join(f"{name} {_version(name)}" for name in names))
    console.print(f"Python {platform.python_version()}, CUDA {torch.version.cuda or 'none'}")
    capability, what = _chip(args.chip)
    console.print(what)
    table = Table("operation", "dtype", "implementation", "why", title="backend auto")
    for op in (*_runtime.ROW_KERNELS, *_runtime.PRODUCTS):
        choices = {d: _runtime.choose(op, capability, d) for d in _runtime.DTYPES}
        if len(set(choices.values())) == 1:
            table.add_row(op, "any", *choices[torch.float32])
        else:
            table.add_row(op, "fp16, bf16", *choices[torch.float16])
            table.add_row("", "fp32", *choices[torch.float32])
    table.add_row("layer_norm_mlp", "any", "its parts", "layer_norm, then linear twice")
    console.print(table)
    return 0


def _version(name):
    try:
        return version(name)
    except ModuleNotFoundError:
        return "not installed"


def _chip(chip):
    if chip is not None:
        try:
            major, minor = map(int, chip.split("."))
        except ValueError:
            raise ValueError(f"--chip: {chip!r}, want a compute capability such as 9.0") from None
        return (major, minor), f"chip: compute capability {major}.{minor} (asked for, not here)"
    if not torch.cuda.is_available():
        return None, "chip: no CUDA device, CPU only"
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return (major, minor), f"chip: {name}, compute capability {major}.{minor}"
