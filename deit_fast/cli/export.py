"""A model as a file for use elsewhere: torch.export, AOTInductor or ONNX.

Examples:
  deit-fast export deit_small_distilled --format onnx --out small.onnx
  deit-fast export deit_tiny --format torch-export --out tiny.pt2 --batch 256 --dtype fp16
  deit-fast export deit_base_distilled --checkpoint base.pth --format aoti --out base.pt2

The file takes float images (B, 3, H, W), normalised, and returns logits. It is loaded again and
compared with the model before it gets its name; an earlier file of that name stays if that fails.
On a GPU, torch-export keeps deit_fast's kernels, and loading the file then takes an import of
deit_fast; --backend torch leaves them out. The other formats never hold them.

Weights are timm's from the Hugging Face hub unless --checkpoint names a file.
"""

import argparse

import torch

from deit_fast.export import BACKENDS, FORMATS, check, export

from . import _models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument(
        "model", metavar="MODEL",
        help="one of ours, any timm name, or a folder from save_pretrained",
    )  # fmt: skip
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, metavar="PATH", help=".onnx for onnx, else .pt2")
    _models.add_arguments(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="(default: any)")
    parser.add_argument("--dtype", choices=_models.DTYPES, default="fp32", help="(default: fp32)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto",
        help="torch: no kernels of deit_fast in a torch-export file (default: auto)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Export the model, and return the exit status."""
    check(args.out, args.format, args.batch)  # before weights are downloaded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _models.load(args).to(device, _models.DTYPES[args.dtype])
    print(export(model, args.out, args.format, batch=args.batch, backend=args.backend))
    return 0
