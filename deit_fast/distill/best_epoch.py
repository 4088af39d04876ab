"""Which epoch a run ends with: the last one, or the best by a metric, whose weights it keeps.

The rows of the log say which epoch that is, so a checkpoint needs no more than them. The weights
lie beside it, in `best-EPOCH.pt`: written before the checkpoint that needs them, and deleted after
the checkpoint that does not. Whenever a run is killed, those that its checkpoint needs are there.
"""

from pathlib import Path

from . import checkpoints, run_folder


def score(scores: dict, metric: str) -> float:
    """The number that is to be as high as possible.

    Args:
        scores: What `validation.validate` returns.
        metric: "top1" or "balanced" (percent; of the model's own output, `joint` where there are
            two heads), or "loss", here with the opposite sign.
    """
    if metric == "loss":
        return -scores["loss"]
    found = scores[metric]
    return found.get("joint", found["class"])


def best_row(rows: list[dict], metric: str) -> dict:
    """Choose a row of the log: the first of the best, or without a metric the last.

    Raises:
        ValueError: No epoch was evaluated.
    """
    if not metric:
        return rows[-1]
    return max((row for row in rows if "scores" in row), key=lambda r: score(r["scores"], metric))


def has_ended(rows: list[dict], metric: str, patience: int) -> bool:
    """Whether a run stops early: its last evaluation is `patience` epochs or more after the best.

    Args:
        rows: Of the log so far.
        metric: See `score`.
        patience: In epochs; 0: it never stops early.
    """
    if not patience or not rows or "scores" not in rows[-1]:
        return False
    return rows[-1]["epoch"] - best_row(rows, metric)["epoch"] >= patience


def path_of(out: Path, epoch: int) -> Path:
    """The file with an epoch's weights."""
    return out / run_folder.BEST.replace("*", str(epoch))


def require_weights(out: Path, rows: list[dict], metric: str) -> None:
    """Check that the weights of the best epoch so far are there.

    Raises:
        ValueError: They are not.
    """
    if metric and any("scores" in row for row in rows):
        path = path_of(out, best_row(rows, metric)["epoch"])
        if not path.is_file():
            raise ValueError(
                f"out: {path} is not there, expected the best weights so far beside their "
                "checkpoint (restart begins anew)"
            )


def keep_only(out: Path, epoch: int) -> None:
    """Delete the weights of all other epochs."""
    for path in out.glob(run_folder.BEST):
        if path != path_of(out, epoch):
            path.unlink()


def save(out: Path, epoch: int, state: dict) -> None:
    """Save the weights of an epoch, whole or not at all.

    Raises:
        OSError: As for `checkpoints.write_atomically`.
    """
    checkpoints.save(path_of(out, epoch), state)


def load(out: Path, epoch: int) -> dict:
    """Load what `save` wrote.

    Raises:
        ValueError: The file is damaged.
    """
    return checkpoints.load(path_of(out, epoch))
