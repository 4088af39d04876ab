"""What distillation does to a model, and what a set of training runs gave.

`predicted_classes` and `disagreement` are the DeiT paper's Table 4. `token_similarity` has the
cosines that its section 4 reports (0.06 at the input, 0.93 at the last layer), `comparison` the
columns of its Tables 2 and 3.
"""

import json
from functools import partial, reduce
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from . import evaluate
from .datasets import ImageSet

TRUTH = "truth"
TOKENS = {"class": "class", "distill": "distillation", "joint": "both"}
METHODS = {"none": "no distillation", "soft": "soft", "hard": "hard", "store": "soft-label store"}
COLUMNS = (
    "model", "method", "teacher", "tokens tested", "size", "epochs", "seeds", "top-1", "top-5",
)  # fmt: skip
RUN: dict[str, tuple[type, ...]] = {
    "model": (str,), "teacher": (str, type(None)), "teacher_top1": (float, int, type(None)),
    "distill": (str,), "distill_token": (str, type(None)), "img_size": (int,), "epochs": (int,),
    "seed": (int,), "params": (int,),
}  # fmt: skip
RESULT: dict[str, tuple[type, ...]] = {"images": (int,), "top1": (dict,), "top5": (dict,)}


# Table 4


def parse_classifiers(specs: list[str]) -> dict[str, list[str | None]]:
    """Parse NAME or NAME:head, several of them.

    Returns:
        {NAME: heads}, with None where no head was said.

    Raises:
        ValueError: A head is unknown.
    """
    found: dict[str, list[str | None]] = {}
    for spec in specs:
        name, _, said = spec.rpartition(":")
        head: str | None = said
        if not name or Path(spec).is_dir() or name in ("hf-hub", "local-dir"):
            name, head = spec, None
        elif head not in evaluate.HEADS:
            raise ValueError(f"{spec}: head {head!r}, expected one of {evaluate.HEADS}")
        found.setdefault(name, []).append(head)
    return found


def rows_of(name: str, model: nn.Module, heads: list[str | None]) -> dict[str, str]:
    """Name the rows of Table 4 that a model has.

    Args:
        name: Of the model.
        model: Distilled or not.
        heads: See `parse_classifiers`. For None a distilled model has three, as in the paper.

    Returns:
        {name of a row: head}.

    Raises:
        ValueError: The model does not have a head.
    """
    own = evaluate.heads_of(model)
    if wrong := [head for head in heads if head and head not in own]:
        raise ValueError(f"{name}:{wrong[0]}: {type(model).__name__} has one head")
    if len(own) == 1:
        return {name: own[0]}
    wanted = [h for head in heads for h in (TOKENS if head is None else (head,))]
    return {f"{name}:{head}": head for head in wanted}


def predicted_classes(
    runs: list[tuple[dict[str, str], evaluate.Predictions]],
) -> dict[str, np.ndarray]:
    """Collect top-1 classes over the images that every model could read.

    Args:
        runs: The rows of each model, see `rows_of`, and its predictions.

    Returns:
        {name of a row: classes (n,) int64}; first the labels, as "truth".
    """
    numbers = reduce(np.intersect1d, (run.numbers for _, run in runs))
    found: dict[str, np.ndarray] = {}
    for rows, run in runs:
        here = np.isin(run.numbers, numbers)
        found.setdefault(TRUTH, run.labels[here])
        found |= {name: run.top[head][here, 0] for name, head in rows.items()}
    return found


def disagreement(predicted: dict[str, np.ndarray]) -> np.ndarray:
    """Compute the disagreement rate of each two rows of `predicted_classes`.

    Returns:
        (R, R) float64, the rate of images for which the two predict different classes; symmetric,
        with a zero diagonal.

    Raises:
        ValueError: There are no images.
    """
    rows = list(predicted.values())
    if not rows or not len(rows[0]):
        raise ValueError("images: none that every model could read")
    return np.array([[np.mean(a != b) for b in rows] for a in rows])


# Similarity of the tokens


class Similarity(NamedTuple):
    """Mean cosine of class and distillation token, and over what.

    Attributes:
        cosines: By place: "input", "block 1" to "block L", "norm".
        images: How many the mean is of.
        skipped: Name of each unreadable image, and why.
    """

    cosines: dict[str, float]
    images: int
    skipped: list[tuple[str, str]]


def token_similarity(
    model: nn.Module, images: ImageSet, *, count: int = 1000, batch_size: int = 64,
    workers: int = 0,
) -> Similarity:  # fmt: skip
    """Compute the cosine of the two tokens at each depth.

    That at the input is of the tokens as learned, without positions; those after each block and
    after the final norm are means over images.

    Args:
        model: Distilled, in eval mode.
        images: The set.
        count: How many of them, spread evenly over the set.
        batch_size: Images in a forward pass.
        workers: Processes that decode; 0: this one.

    Raises:
        ValueError: The model has no distillation token, no image can be read, or an option does not
            fit.
    """
    if len(evaluate.heads_of(model)) == 1:
        raise ValueError(f"model: {type(model).__name__} has no distillation token")
    if model.training:
        raise ValueError("model: in train mode, expected model.eval()")
    if count < 1:
        raise ValueError(f"count: {count}, expected 1 or more")
    count = min(count, len(images))
    chosen = [i * len(images) // count for i in range(count)]
    distilled: Any = model  # timm's attributes are not typed
    depth = len(distilled.blocks)
    sums = torch.zeros(depth + 1, dtype=torch.float64)
    skipped: list[tuple[str, str]] = []
    total, hooks = 0, []

    def collect(place: int, _module: object, _inputs: object, x: Tensor) -> None:
        x = x[:, :2].double()
        sums[place] += cosine_similarity(x[:, 0], x[:, 1]).sum().cpu()

    try:
        for i, block in enumerate(distilled.blocks):
            hooks.append(block.register_forward_hook(partial(collect, i)))
        for some, x in evaluate.batches(model, images, batch_size, workers, skipped, chosen):
            with torch.inference_mode():
                collect(depth, None, None, distilled.forward_features(x))
            total += len(some)
    finally:
        for hook in hooks:
            hook.remove()
    if not total:
        raise ValueError(f"images: none of {count} could be read")
    learned = (distilled.cls_token, distilled.dist_token)
    cls_token, dist_token = (t.detach().double().flatten() for t in learned)
    names = [*(f"block {i + 1}" for i in range(depth)), "norm"]
    means = dict(zip(names, (sums / total).tolist(), strict=True))
    first = cosine_similarity(cls_token, dist_token, 0).item()
    return Similarity({"input": first} | means, total, skipped)


# Tables 2 and 3


def comparison(folders: list[str | Path]) -> list[tuple[str, ...]]:
    """Tabulate the run.json and result.json of training runs.

    Runs that differ in nothing but the seed are one row, with the mean and the sample's standard
    deviation of top-1 and top-5 in percent. One with two tokens has a row for each of them and for
    both.

    Returns:
        Rows of `COLUMNS`.

    Raises:
        ValueError: Files are missing, broken or contradict each other.
    """
    groups: dict[tuple, dict[int, tuple[Path, dict]]] = {}
    for folder in map(Path, folders):
        run = _read(folder / "run.json", RUN)
        if run["distill"] not in METHODS:
            wrong = f"{run['distill']!r}, expected one of {tuple(METHODS)}"
            raise ValueError(f"{folder / 'run.json'}: distill: {wrong}")
        result = _read(folder / "result.json", RESULT)
        seed = run.pop("seed")
        key = tuple(run[k] for k in RUN if k != "seed")
        members = groups.setdefault(key, {})
        if seed in members:
            raise ValueError(f"{folder}: the same run as {members[seed][0]}, with the same seed")
        for other, its in members.values():
            if its["images"] != result["images"]:
                raise ValueError(f"{folder / 'result.json'}: images: {result['images']}, but "
                                 f"{its['images']} in {other}")  # fmt: skip
        members[seed] = folder, result
    rows = []
    for key, members in groups.items():
        run = dict(zip((k for k in RUN if k != "seed"), key, strict=True))
        method = METHODS[run["distill"]]
        if run["distill_token"] == "distill":
            method += ", distillation token"
        two = any("joint" in result["top1"] for _, result in members.values())
        teacher = run["teacher"] or "–"
        if run["teacher"] and run["teacher_top1"] is not None:
            teacher += f" ({run['teacher_top1']:.1f})"
        for head, token in TOKENS.items() if two else [("class", "class")]:
            percents = [
                _spread([_percent(folder / "result.json", result, top, head)
                         for folder, result in members.values()])
                for top in ("top1", "top5")
            ]  # fmt: skip
            rows.append((
                run["model"], method, teacher, token,
                str(run["img_size"]), str(run["epochs"]), str(len(members)), *percents,
            ))  # fmt: skip
    return rows


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Format the rows of `comparison` as a Markdown table, numbers to the right."""
    lines = [COLUMNS, ["---"] * 4 + ["--:"] * 5, *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _read(path: Path, wanted: dict[str, tuple[type, ...]]) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a JSON object")
    for key, kinds in wanted.items():
        if key not in found:
            raise ValueError(f"{path}: has no {key}")
        if type(found[key]) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "null")
            raise ValueError(f"{path}: {key}: {found[key]!r}, expected {names}")
    return found


def _percent(path: Path, result: dict, top: str, head: str) -> float:
    value = result[top].get(head)
    if type(value) not in (int, float) or not 0 <= value <= 100:
        raise ValueError(f"{path}: {top}: {head}: {value!r}, expected a percentage")
    return value


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"
