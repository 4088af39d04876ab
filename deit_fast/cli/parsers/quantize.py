"""Quantize a model to FP8 or INT8, and report its error.

Without --data the models are compared on the photographs that come with deit_fast. fp8 without
--calibration has bound-derived activation scales. --worst quantizes each layer alone, then all but
it, and ranks the layers: --exclude the first. Exit code: 0; 1 if images could not be read and were
skipped; 2 for an error; 130 for Ctrl-C.

Examples:
  deit-fast quantize deit_base --calibration imagenet --data imagenet --out base-fp8
  deit-fast quantize deit_small --format int8 --exclude 'blocks.0.*' --worst --json small.json
"""

from pathlib import Path

from deit_fast import _names
from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", help="as eval takes it: a ViT or DeiT")
    parser.add_argument(
        "--format", choices=_names.QUANTIZED_FORMATS, default="fp8", metavar="FORMAT",
        help="fp8 or int8 (default: fp8)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", metavar="DATA",
        help="images to calibrate fp8 on: their train split, any folder, list or pattern",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int, metavar="N",
        help="number of calibration images, spread evenly (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN",
        help="layers to skip: blocks.0.attn.qkv, 'blocks.11.*'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--attention", action="store_true", help="attention's two matmuls in fp8 too"
    )
    parser.add_argument("--data", metavar="DATA", help="labelled images, as eval takes them")
    parser.add_argument(
        "--split", choices=("train", "validation"), metavar="SPLIT",
        help="of --data: train or validation (default: validation if it has that, else all)",
    )  # fmt: skip
    _options.add_image_keys(parser)
    parser.add_argument("--worst", action="store_true", help="rank the layers by their error")
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the model there")
    _options.add_json(parser)
    _options.add_weights(parser)
    _options.add_running(parser)
