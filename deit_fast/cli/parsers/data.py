"""Look at a data set before training on it: counts, sizes, damaged images, duplicates.

Near-duplicates (another size, format, quality or brightness of the same picture) are found by a
perceptual hash, inside a split and across splits. Classes are as deit-fast train reads them.

Exit code: 0; 1 where images could not be read, or the same picture is in both splits; 2 for an
error; 130 for Ctrl-C.

Examples:
  deit-fast data photos
  deit-fast data photos --sheet photos.webp --json photos.json
"""

from pathlib import Path

from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "data", metavar="DATA",
        help="a folder of classes, a table, .tar files, a Hugging Face dataset, or IDX files",
    )  # fmt: skip
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE",
        help="write some pictures of each class to FILE (.png, .jpg, .webp)",
    )  # fmt: skip
    _options.add_json(parser, "all of it")
    _options.add_image_keys(parser)
    _options.add_training_workers(parser)
