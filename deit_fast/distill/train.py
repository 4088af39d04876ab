"""Training, with or without a teacher: runs that go on where they stopped, bit for bit.

What a step sees and draws depends on the seed, the epoch and the step alone: the images' order and
augmentation (`augment`), Mixup, dropout and stochastic depth. So a checkpoint needs no state of any
generator, and the number of workers changes nothing.
"""

import contextlib
from pathlib import Path

from . import run_folder
from .distributed import Ranks
from .interrupt import Interrupted, catch_signals
from .recipe import Recipe
from .run import Report, Run
from .student import Settings


def train(
    settings: Settings,
    recipe: Recipe,
    out: str | Path,
    *,
    workers: int = 0,
    save_every: int = 1000,
    eval_every: int = 1,
    restart: bool = False,
    tensorboard: bool = False,
    report: Report = lambda event: None,
) -> dict:
    """Train into the folder `out`; the same call again goes on from its checkpoint.

    Under torchrun each rank makes this call.

    Args:
        settings: What is trained on what.
        recipe: How.
        out: Gets settings.json, checkpoint.pt, log.csv (an epoch a row), unreadable.csv, run.json,
            result.json, and the models of the last epoch, or of the best by `settings.best`: model/
            and with the recipe's `ema` model-ema/, for `deit_fast.from_pretrained`. best-EPOCH.pt
            has the weights of the best epoch so far.
        workers: Processes that decode and augment.
        save_every: Updates between checkpoints, besides the one after each epoch.
        eval_every: Epochs between evaluations; the last one is always evaluated.
        restart: Throw away what `out` holds.
        tensorboard: Write its logs too.
        report: Gets a dict with "event": "begin", "update", "epoch" or "note", on rank 0 alone.

    Returns:
        The content of result.json.

    Raises:
        ValueError: Arguments or files do not fit, or `out` holds a run with other settings.
        FileNotFoundError: Data or weights are missing.
        FloatingPointError: The loss or weights are not finite; the last good checkpoint stays.
        Interrupted: After SIGTERM or SIGINT, with everything that was trained saved.
        OSError: Something can't be written.
        RuntimeError: An extra is missing that the settings need.
    """
    for name, value, least in (("workers", workers, 0), ("save_every", save_every, 1),
                               ("eval_every", eval_every, 1)):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: {value}, expected {least} or more")
    if tensorboard:
        run_folder.summary_writer()  # or an error before anything else
    out = Path(out)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(Ranks.joined())
        if ranks.is_main:
            stack.enter_context(run_folder.locked(out))
        caught = stack.enter_context(catch_signals())
        run = Run(settings, recipe, out, ranks, workers, caught, report)
        run.begin(restart)
        log = None
        if tensorboard and ranks.is_main:
            log = stack.enter_context(run_folder.tensorboard(out, run.epoch + 1))
        try:
            return run.go(save_every, eval_every, log)
        except RuntimeError as error:  # a worker that the signal found before it had begun
            if caught and not isinstance(error, Interrupted):
                raise Interrupted(caught[0], run.saved) from error
            raise
