"""Write a model to a file: torch.export, AOTInductor or ONNX.

The file takes float images (B, 3, H, W), normalised, and returns logits. It is loaded again and
compared with the model before it gets its name; an earlier file of that name stays if that fails.
On a GPU, torch-export keeps deit_fast's kernels, and loading the file then takes an import of
deit_fast; --backend torch leaves them out. The other formats never hold them.

Example:
  deit-fast export deit_small_distilled --format onnx --out small.onnx
"""

from deit_fast import _names
from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("model", metavar="MODEL", help=_options.NAME)
    parser.add_argument(
        "--format", required=True, choices=_names.EXPORT_FORMATS, metavar="FORMAT",
        help=", ".join(_names.EXPORT_FORMATS),
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="PATH", help=".onnx for onnx, else .pt2")
    parser.add_argument("--batch", type=int, metavar="N", help="(default: any)")
    parser.add_argument(
        "--dtype", choices=_names.DTYPES, default="fp32", metavar="DTYPE",
        help=f"{', '.join(_names.DTYPES)} (default: fp32)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=_names.EXPORT_BACKENDS, default="auto", metavar="NAME",
        help="auto or torch: no kernels of deit_fast in the file (default: auto)",
    )  # fmt: skip
    _options.add_weights(parser)
