"""Measured choices: which implementation and configuration serves a shape on a chip.

A table is data, `<chip>.json`: {"gpu", "capability", "torch", "triton", "date", "choices": [...]},
each choice {"op", "shape", "choice", "ms", "others"}. `shape` holds what the operation looks up.
`M` in it, rows or whatever else grows with the batch, matches within a factor of two; the rest
matches exactly. Shapes that no table lists go by the operation's rule. The user's own table, which
`python -m deit_fast.tune` writes to `folder()`, comes before the shipped one. A table that cannot
be read, or is another chip's, or names what no operation offers, is ignored with a warning.
"""

import json
import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from . import _chips, _explain, _plan_library

# One choice, or a shape: what JSON holds. A table: (op, shape without M) -> [(M, choice)].
Choice: TypeAlias = dict[str, Any]
Shape: TypeAlias = dict[str, Any]
Table: TypeAlias = dict[tuple[str, frozenset], list[tuple[int, Choice]]]
Validator: TypeAlias = Callable[[Shape, Choice, tuple[int, int]], str | None]
ValidatorT = TypeVar("ValidatorT", bound=Validator)

SHIPPED = Path(__file__).with_name("tuned")
# Names of epilogues in tables written before 0.1 -> what they are called now.
_RENAMED_EPILOGUES = {"moments": "row_stats"}

_forced: dict[str, Choice] = {}
_assumed: list[Table] = []
_disabled = False
_validators: dict[str, Validator] = {}


def folder() -> Path:
    """Where the user's tables are."""
    return _plan_library.cache_folder() / "tuned"


def slug(name: str) -> str:
    """A chip's name as a file's: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")


def validates(op: str) -> Callable[[ValidatorT], ValidatorT]:
    """Decorator: registers (shape, choice, capability) -> why `op` has no such choice, or None."""

    def register(function: ValidatorT) -> ValidatorT:
        _validators[op] = function
        return function

    return register


@contextmanager
def forced(op: str, choice: Choice) -> Iterator[None]:
    """Context in which `choice` serves `op`, whatever the shape: for tests and for tuning."""
    before = _forced.get(op)
    _forced[op] = choice
    _plan_library.changed()
    try:
        yield
    finally:
        _forced.pop(op) if before is None else _forced.update({op: before})
        _plan_library.changed()


@contextmanager
def disabled(really: bool = True) -> Iterator[None]:
    """Context in which no table counts (unless not `really`): the rules decide."""
    global _disabled
    before, _disabled = _disabled, really or _disabled
    _plan_library.changed()
    try:
        yield
    finally:
        _disabled = before
        _plan_library.changed()


@contextmanager
def assumed(rows: list[dict], chip: _chips.Chip) -> Iterator[None]:
    """Context in which these rows come before every table's: those of a tuning run under way."""
    global _assumed
    before, _assumed = _assumed, [_index(rows, chip)]
    _plan_library.changed()
    try:
        yield
    finally:
        _assumed = before
        _plan_library.changed()


def lookup(op: str, shape: Shape, chip: _chips.Chip) -> Choice | None:
    """{"implementation": ..., configuration} for a shape on a chip; None: the rule decides."""
    found = _forced.get(op)
    if found is None and _assumed:
        found = _search(_assumed, op, shape)
    if found is None and not _disabled:
        found = _find(op, tuple(shape.items()), chip)
    if found is not None and _explain.decisions is not None:
        source = "_tuned.forced" if op in _forced else f"tuned table of {chip.name}"
        _explain.record_table(op, found["implementation"], f"{source}: {_entry(shape, found)}")
    return found


def _entry(shape: Shape, choice: Choice) -> str:
    """A row of a table in words."""
    asked, config = (
        ", ".join(f"{k} {v}" for k, v in items if v is not None and k != "implementation")
        for items in (shape.items(), choice.items())
    )
    return f"{asked} -> {config}" if config else asked


def implementation(
    op: str, weight: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, **sizes: int
) -> str | None:
    """The implementation that the table measured at the largest M.

    For choices that a caller makes before it knows M. Under torch.compile it is a constant. There
    the rule serves a weight that is no parameter, because its sizes may be symbols.
    """
    if torch.compiler.is_compiling() and not isinstance(weight, torch.nn.Parameter):
        return None
    shape = *sizes.items(), ("dtype", str(dtype)[6:])
    return _implementation(op, shape, x.device.type, x.device.index)


@torch.compiler.assume_constant_result
def _implementation(op, shape, kind, index):
    found = lookup(op, dict(shape) | {"M": None}, _chips.chip(torch.device(kind, index)))
    return found and found["implementation"]


@cache
def _find(op, shape, chip):
    return _search(_tables(chip), op, dict(shape))


def _search(tables: list[Table], op: str, shape: Shape) -> Choice | None:
    M = shape["M"]
    key = op, frozenset((k, v) for k, v in shape.items() if k != "M")
    for table in tables:
        entries = table.get(key, [])
        if M is None and entries:
            return max(entries, key=lambda entry: entry[0])[1]
        near = [(max(M, m) / max(min(M, m), 1), choice) for m, choice in entries]
        ratio, choice = min(near, key=lambda pair: pair[0], default=(3, None))
        if ratio <= 2:
            return choice
    return None


def forget() -> None:
    """Read the tables again at the next call."""
    _find.cache_clear()
    _tables.cache_clear()
    _plan_library.changed()


@cache
def _tables(chip: _chips.Chip) -> list[Table]:
    """The user's table and the shipped one for the chip, without those that are ignored."""
    found = []
    for path in (folder() / f"{slug(chip.name)}.json", SHIPPED / f"{slug(chip.name)}.json"):
        if not path.exists():
            continue
        try:
            found.append(read(path, chip))
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
    return found


def chosen(gpu: str) -> list[list[str]]:
    """[operation, shape, choice] of every row of the GPU's tables, sorted, as the files have them.

    The user's table comes before the shipped one. A table that cannot be read counts as none.
    """
    found = {}
    for folder_of in (SHIPPED, folder()):
        path = folder_of / f"{slug(gpu)}.json"
        if not path.exists():
            continue
        try:
            rows = json.loads(path.read_text())["choices"]
            for row in rows:
                key = row["op"], json.dumps(row["shape"], sort_keys=True)
                found[key] = json.dumps(row["choice"], sort_keys=True)
        except (OSError, ValueError, KeyError, TypeError):  # ignored, with a warning, by lookup
            continue
    return sorted([op, shape, choice] for (op, shape), choice in found.items())


def read(path: Path, chip: _chips.Chip) -> Table:
    """The choices of a table for `chip`.

    Raises:
        ValueError: Where the file is no table, or another chip's, or has a choice that cannot be.
        OSError: Where it cannot be read.
    """
    return _index(read_rows(path, chip), chip)


def read_rows(path: Path, chip: _chips.Chip) -> list[dict]:
    """The rows of a table for `chip`, with today's names of epilogues.

    Raises:
        ValueError: Where the file is no table, or another chip's.
        OSError: Where it cannot be read.
    """
    try:
        table = json.loads(path.read_text())
    except UnicodeDecodeError as error:
        raise ValueError(f"not text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(table, dict) or not isinstance(table.get("choices"), list):
        raise ValueError('expected an object with "gpu", "capability" and a list of "choices"')
    for name, got, expected in (
        ("gpu", table.get("gpu"), chip.name),
        ("capability", table.get("capability"), list(chip.capability)),
    ):
        if got != expected:
            raise ValueError(f"another chip's: {name} is {got!r}, this one's {expected!r}")
    return [_with_todays_epilogue(row) for row in table["choices"]]


def _with_todays_epilogue(row):
    """The row; a malformed one as it is, for `_index` to name."""
    try:
        shape = dict(row["shape"])
        names = shape["epilogue"].split("+")
        shape["epilogue"] = "+".join(_RENAMED_EPILOGUES.get(name, name) for name in names)
        return row | {"shape": shape}
    except (AttributeError, KeyError, TypeError, ValueError):
        return row


def _index(choices: list[dict], chip: _chips.Chip) -> Table:
    entries: Table = {}
    for i, row in enumerate(choices):
        try:
            op, shape, choice = row["op"], dict(row["shape"]), dict(row["choice"])
            M = shape.pop("M")
            if type(M) is not int or M < 0:
                raise TypeError(f"M is {M!r}")
            key = op, frozenset(shape.items())
            if op in _validators:
                problem = _validators[op](shape, choice, chip.capability)
            else:
                problem = f"no operation of that name, expected one of {sorted(_validators)}"
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"choices[{i}] is malformed ({error!r})") from error
        if problem:
            raise ValueError(f"choices[{i}] of {op}: {problem}")
        entries.setdefault(key, []).append((M, choice))
    return entries


def check_choice(
    choice: Choice, implementations: Iterable[str], configs: Container[dict]
) -> str | None:
    """What no operation may be given: an unknown implementation, or a configuration not listed.

    Returns:
        Why the choice cannot be; None: it can.
    """
    implementations = list(implementations)
    name = choice.get("implementation")
    if name not in implementations:
        return f"implementation {name!r}, expected one of {implementations}"
    config = {k: v for k, v in choice.items() if k != "implementation"}
    if any(type(v) not in (int, bool) for v in config.values()):
        return f"a configuration that is not made of whole numbers: {config}"
    if config and (name != "triton" or config not in configs):
        return f"a configuration that {name!r} does not offer: {config}"
    if name == "triton" and not config:
        return "no configuration"
    return None
