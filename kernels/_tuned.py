"""Measured choices: which implementation and configuration serves a shape on a chip.

A table is data, `<chip>.json`: {"gpu", "capability", "torch", "triton", "date", "choices": [...]},
each choice {"op", "shape", "choice", "ms", "others"}. `shape` holds what the operation looks up;
`M` in it, rows or whatever else grows with the batch, matches within a factor of two and the rest
exactly. Shapes that no table lists go by the operation's rule. The user's own table, which
`python -m deit_fast.tune` writes to `folder()`, comes before the one that is shipped. A table that
can't be read, or is another chip's, or names what no operation offers, is ignored with a warning.
"""

import json
import os
import re
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from . import _chips

SHIPPED = Path(__file__).with_name("tuned")
_forced: dict[str, dict] = {}
_assumed: list[dict] = []
_disabled = False
_validators: dict = {}  # op -> (shape, choice, capability) -> why it can't be, or None


def folder() -> Path:
    """Where the user's tables are: DEIT_FAST_CACHE, or deit_fast in the user's cache directory."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DEIT_FAST_CACHE") or Path(cache_home, "deit_fast")) / "tuned"


def slug(name: str) -> str:
    """A chip's name as a file's: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")


def validates(op: str):
    """Decorator: the function says why a choice for a shape can't be; None: it can."""

    def register(function):
        _validators[op] = function
        return function

    return register


@contextmanager
def forced(op: str, choice: dict):
    """Within it `op` is served by `choice`, whatever the shape: for tests and for tuning."""
    before = _forced.get(op)
    _forced[op] = choice
    try:
        yield
    finally:
        _forced.pop(op) if before is None else _forced.update({op: before})


@contextmanager
def disabled(really: bool = True):
    """Within it no table counts (unless not `really`): the rules decide."""
    global _disabled
    before, _disabled = _disabled, really or _disabled
    try:
        yield
    finally:
        _disabled = before


@contextmanager
def assumed(rows: list[dict], chip):
    """Within it these choices come before every table's: of a tuning that goes on."""
    global _assumed
    before, _assumed = _assumed, [_index(rows, chip)]
    try:
        yield
    finally:
        _assumed = before


def lookup(op: str, shape: dict, chip) -> dict | None:
    """{"implementation": ..., configuration} for a shape on a chip; None: the rule decides."""
    if op in _forced:
        return _forced[op]
    found = _search(_assumed, op, shape) if _assumed else None
    if found is not None or _disabled:
        return found
    return _find(op, tuple(shape.items()), chip)


def implementation(op: str, weight, x, dtype: torch.dtype, **sizes) -> str | None:
    """The implementation alone, by shapes without M, for choices that a caller makes before it
    knows M: the one measured at the largest M. Under torch.compile a constant; there the rule
    serves a weight that is no parameter, whose sizes may be symbols."""
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


def _search(tables, op, shape):
    M = shape["M"]
    key = op, frozenset((k, v) for k, v in shape.items() if k != "M")
    for table in tables:
        entries = table.get(key, ())
        if M is None and entries:
            return max(entries, key=lambda entry: entry[0])[1]
        near = [(max(M, m) / max(min(M, m), 1), choice) for m, choice in entries]
        ratio, choice = min(near, key=lambda pair: pair[0], default=(3, None))
        if ratio <= 2:
            return choice
    return None


def forget():
    """Read the tables again at the next call."""
    _find.cache_clear()
    _tables.cache_clear()


@cache
def _tables(chip):
    """{(op, shape without M): [(M, choice)]} of each table for the chip that is there and right."""
    found = []
    for path in (folder() / f"{slug(chip.name)}.json", SHIPPED / f"{slug(chip.name)}.json"):
        if not path.exists():
            continue
        try:
            found.append(read(path, chip))
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
    return found


def chosen(gpu: str) -> list:
    """[operation, shape, choice] of every row of the GPU's tables, sorted; the user's table comes
    before the shipped one. A table that can't be read counts as none."""
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


def read(path: Path, chip) -> dict:
    """A table's choices. Raises ValueError or OSError with the reason why it is no use."""
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
    return _index(table["choices"], chip)


def _index(choices, chip):
    entries = {}
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


def check_choice(choice, implementations, configs) -> str | None:
    """Of every choice: a known implementation, and for "triton" a known configuration."""
    name = choice.get("implementation")
    if name not in implementations:
        return f"implementation {name!r}, expected one of {list(implementations)}"
    config = {k: v for k, v in choice.items() if k != "implementation"}
    if any(type(v) not in (int, bool) for v in config.values()):
        return f"a configuration that is not made of whole numbers: {config}"
    if config and (name != "triton" or config not in configs):
        return f"a configuration that {name!r} does not offer: {config}"
    if name == "triton" and not config:
        return "no configuration"
    return None
