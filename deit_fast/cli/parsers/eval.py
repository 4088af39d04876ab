"""Measure top-1 and top-5 of a model over labelled images.

A distilled model has a row for each head. Labels are compared by number: DATA has to have the
model's classes, in sorted order, and all of them. --real takes the ReaL labels of ImageNet's
validation images (Beyer et al., 2020). --report writes report.html, for a browser, with the same
as JSON and CSV. --calibrate finds a temperature and a threshold for unknown images on DATA, which
the model must not be trained on, and writes them into config.json of the folder that --model names.

Exit code: 0; 1 where images could not be read and were skipped; 2 for an error; 130 for Ctrl-C.

Examples:
  deit-fast eval imagenet --model deit_small_distilled
  deit-fast eval cifar10 --model runs/tiny/model --json tiny.json
  deit-fast eval photos --model runs/photos/model --report report --calibrate
"""

from pathlib import Path

from deit_fast import _names
from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    _options.add_images(parser)
    parser.add_argument("--model", required=True, metavar="NAME", help=_options.NAME)
    parser.add_argument("--real", type=Path, metavar="FILE", help="also judge by these labels")
    _options.add_json(parser)
    report = parser.add_argument_group("report and calibration")
    report.add_argument("--report", type=Path, metavar="DIR", help="write report.html and tables")
    report.add_argument(
        "--calibrate", action="store_true", help="write temperature and threshold into MODEL"
    )
    report.add_argument(
        "--keep", type=float, default=0.95, metavar="SHARE",
        help="of the correctly classified images that stay known (default: %(default)s)",
    )  # fmt: skip
    report.add_argument(
        "--unknown-score", choices=_names.UNKNOWN_SCORES, default="max_logit", metavar="SCORE",
        help="max_logit or energy (default: %(default)s)",
    )  # fmt: skip
    _options.add_weights(parser, heads=False)  # all of them are shown
    _options.add_running(parser)
