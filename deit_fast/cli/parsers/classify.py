"""Classify images, or compute their features.

An IMAGE is an image file, a folder (with its subfolders), a pattern in quotes, or a .txt list of
paths. With --out, the same command resumes an interrupted run; until it is complete, its
predictions are in FILE.partial. Unreadable files get a row with the reason.

Exit code: 0; 1 if some file could not be read (with --out that is no failure: 0); 2 for an error;
130 for Ctrl-C.

Examples:
  deit-fast classify cat.jpg dog.png
  deit-fast classify photos/ --out classes.csv
  deit-fast classify photos/ --model runs/photos/model --unknown
"""

from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--model", default="deit_small_distilled", metavar="NAME",
        help=f"{_options.NAME} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="(default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, metavar="P",
        help="only classes of at least this probability, else 'unknown'",
    )  # fmt: skip
    parser.add_argument(
        "--unknown", action="store_true",
        help="'unknown' for images below the threshold that MODEL was calibrated with",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")
    parser.add_argument(
        "--out", metavar="FILE", help="write .csv, .jsonl or .parquet; with --embed .npy, .parquet"
    )
    parser.add_argument(
        "--embed", action="store_true", help="features (the heads' input) instead of classes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE when complete")
    parser.add_argument(
        "--restart", action="store_true", help="delete what an interrupted run left"
    )
    _options.add_weights(parser)
    _options.add_running(parser, "; without --out none")
