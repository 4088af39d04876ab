"""Train a model, distilled from a teacher or not.

The same command again goes on where it stopped. DATA is a folder with train and val in it (folders
of classes, .tar shards, .parquet files), a table, what save_to_disk wrote, or MNIST's idx files.
Ctrl-C and SIGTERM save and stop. Exit code: 0; 2 for an error; 130 and 143 after those signals.

Examples:
  deit-fast train imagenet/ --model deit_small_distilled --teacher regnety_160 --out small
  torchrun --nproc-per-node 8 -m deit_fast train imagenet/ --model deit_base --amp bf16 --out base
"""

from pathlib import Path

from deit_fast import _names
from deit_fast._argparse import Parser

from . import _options


def add_arguments(parser: Parser, from_store: bool = False) -> None:
    """Add the command's options.

    Args:
        parser: Gets them.
        from_store: The store is an argument, and no teacher can be given.
    """
    parser.add_argument("data", metavar="DATA")
    if from_store:
        parser.add_argument("store", metavar="STORE")
        parser.set_defaults(distill="none", teacher=None)
        parser.set_defaults(teacher_checkpoint=None, teacher_checkpoint_key=None)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of this run alone")
    parser.add_argument("--model", metavar="NAME", help="one of ours or any timm name")
    parser.add_argument(
        "--from", dest="start", metavar="WEIGHTS",
        help="a folder (DIR/model of a run), a file, or 'pretrained': timm's",
    )  # fmt: skip
    _options.add_recipe(parser)
    if not from_store:
        _add_teacher(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--seed", type=int, default=0, metavar="N")
    run.add_argument(
        "--accum", type=int, default=1, metavar="N", help="parts a batch is computed in"
    )
    _options.add_amp(run, "(default: the best the GPU has; none on a CPU)")
    run.add_argument("--compile", metavar="MODE", help="torch.compile's, such as reduce-overhead")
    _options.add_training_workers(run)
    run.add_argument("--restart", action="store_true", help="throw away what is in DIR")
    _add_rare(parser)


def _add_teacher(parser: Parser) -> None:
    teacher = parser.add_argument_group("distillation")
    teacher.add_argument(
        "--distill", choices=_names.DISTILLATIONS, metavar="HOW",
        help="none, soft or hard (default: hard with a teacher, else none)",
    )  # fmt: skip
    _options.add_teacher(teacher)
    teacher.add_argument(
        "--store", metavar="DIR", help="learn from a soft-label store (deit-fast distill-store)"
    )


def _add_rare(parser: Parser) -> None:
    more = parser.add_brief_group("more options")
    more.add_argument(
        "--model-args", nargs="+", default=[], metavar="KEY=VALUE",
        help="timm's keyword arguments, such as embed_dim=96 depth=6",
    )  # fmt: skip
    _options.add_key(more, "--from-key", dest="start_key")
    _options.add_img_size(more)
    for name in ("mean", "std"):
        more.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X",
            help="of each channel, pixels from 0 to 1 (default: the model's own)",
        )  # fmt: skip
    _options.add_image_keys(more)
    more.add_argument(
        "--holdout", type=float, default=0.0, metavar="SHARE",
        help="of the images, to validate on where DATA has none for it, such as 0.2",
    )  # fmt: skip
    more.add_argument("--count", type=int, metavar="N", help="train on so many images only")
    _options.add_backend(more)
    more.add_argument(
        "--save-every", type=int, default=1000, metavar="UPDATES",
        help="besides at the end of each epoch (default: %(default)s)",
    )  # fmt: skip
    more.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS")
    more.add_argument("--tensorboard", action="store_true", help="log for it too")
