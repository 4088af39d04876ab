"""Find the state dict in a trainer's file: which entry, and which part of its names."""

import pickle
import re
import threading
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .allowed import ALLOWED

PLACES = ("model", "state_dict", "model_state_dict")  # the entries that most trainers use
# Prefixes that wrappers of a model give its names: DistributedDataParallel, Lightning, DINO. No
# name in timm's models begins with one
WRAPPERS = ("module.", "model.", "backbone.", "student.", "teacher.")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # torch.compile's, of the model or of a part

_ALLOWING = threading.Lock()  # the list of what torch.load allows is global
_DEEPEST, _LISTED = 3, 8  # the most keys on the way to an entry; the most entries in an error


def read_checkpoint(path: str | Path, checkpoint_key: str | None = None) -> dict[str, Tensor]:
    """Read the state dict in a checkpoint.

    Prefixes that wrappers give to every name are removed: "module.", "_orig_mod.", "model.",
    "backbone.", "student.", "teacher.", in any order; "_orig_mod." anywhere in a name. Of a
    "backbone." beside a "head." (DINO's) both are kept.

    No code in the file is run, except classes that the program itself gave to
    `torch.serialization.add_safe_globals`. Objects whose names are in `allowed.py`
    (argparse.Namespace, numpy's numbers, paths, ...) are ignored; a file with any other is refused.

    Args:
        path: A .safetensors file, or what `torch.save` wrote, in any of its formats except the tar
            of 2016: a state dict, or a trainer's checkpoint with one.
        checkpoint_key: The entry with the state dict, such as "model_ema" or "teacher", or the keys
            on the way to it, joined by dots. A common prefix of names may follow the last key:
            "state_dict.student" selects the names that begin with "student.", and removes it.
            None: the usual entry, "model", "state_dict" or "model_state_dict".

    Returns:
        The tensors, on the CPU, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With one line: for a file that is no checkpoint; for a refused object, which is
            named; and for an entry that does not exist or is not the only one, with a list of
            those that are there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint: {path} {_refusal(str(error))}") from error
    except Exception as error:  # the unpickler raises anything for a damaged file
        raise ValueError(f"checkpoint: {path} {_damage(str(error))}") from error
    chosen = _usual(content if checkpoint_key is None else _at(content, checkpoint_key))
    if _is_state_dict(chosen):
        _, state, parts = _unwrapped(chosen)
        if not parts:
            return state
        problem = "holds several networks"
    elif checkpoint_key is None:
        problem = "holds no state dict in a usual place, or several"
    else:
        problem = f"has no state dict at {checkpoint_key!r}"
    found = _choices(content)
    if not found:
        raise ValueError(f"checkpoint: {path} holds no state dict (names with tensors)")
    raise ValueError(f"checkpoint: {path} {problem}, {_listing(found)}")


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with _ALLOWING, torch.serialization.safe_globals(ALLOWED):
        return torch.load(path, map_location="cpu", weights_only=True)


def _refusal(message: str) -> str:
    if found := re.search(r"GLOBAL (\S+)", message):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"  # torch leaves that out
        return (
            f"holds more than tensors: {ascii(name)[1:-1][:80]} is refused, and nothing in the file"
            " was run; what torch.save(model.state_dict(), FILE) writes holds tensors alone"
        )
    if "Unsupported operand" in message:
        return "is no checkpoint (or in another pickle protocol than torch.save's own, 2)"
    return "holds more than tensors: not loaded, and nothing in the file was run"


def _damage(message: str) -> str:
    if "legacy .tar format" in message:
        return "is in torch's tar format of 2016: no longer read"
    if "TorchScript" in message:
        return "is a TorchScript archive, a program: expected the state_dict() of what it holds"
    reason = message.strip().splitlines()[0][:120] if message.strip() else "empty file"
    return f"is truncated or no checkpoint ({reason})"


# Which entry


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) for name in content)
        and all(map(torch.is_tensor, content.values()))
    )


def _at(content: Any, key: str) -> dict | None:
    """Return what a dotted key, or a common prefix of names, selects; None if nothing."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get(key), dict):
        return content[key]
    first, _, rest = key.partition(".")
    if rest and (found := _at(content.get(first), rest)) is not None:
        return found
    names = {_without_compiled(name): name for name in content if isinstance(name, str)}
    start = f"{key}."
    return {n.removeprefix(start): content[names[n]] for n in names if n.startswith(start)} or None


def _usual(content: Any) -> Any:
    """Follow the usual entries."""
    for _ in range(_DEEPEST):
        if not isinstance(content, dict):
            break
        places = [place for place in PLACES if _choices(content.get(place))]
        if len(places) != 1:
            break
        content = content[places[0]]
    return content


def _choices(content: Any) -> dict[str, int]:
    """Return {checkpoint_key: number of tensors} of the networks in a checkpoint."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    entries: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for keys, entry in entries:  # grows meanwhile
        if not isinstance(entry, dict) or id(entry) in seen:
            continue
        seen.add(id(entry))  # a dict may hold itself
        if _is_state_dict(entry) and any(t.dim() for t in entry.values()):  # not only metrics
            start, state, parts = _unwrapped(entry)
            key = ".".join((*keys, *filter(None, start.split("."))))
            many = {f"{key}.{part}" if key else part: number for part, number in parts.items()}
            found |= many or {".".join(keys): len(state)}
        elif len(keys) < _DEEPEST:
            entries += [((*keys, k), e) for k, e in entry.items() if isinstance(k, str)]
    return found


def _listing(found: dict[str, int]) -> str:
    if list(found) == [""]:
        return "for it is a single state dict: leave checkpoint_key out"
    largest = sorted(found, key=lambda key: found[key], reverse=True)
    shown = [f"{key!r} ({found[key]} tensor{'s'[: found[key] - 1]})" for key in largest[:_LISTED]]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"expected as checkpoint_key one of {', '.join(shown)}{more}"


# Which part of the names


def _without_compiled(name: str) -> str:
    return _COMPILED.sub("", name)


def _unwrapped(state: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, int]]:
    """Remove the prefixes of wrappers.

    Returns the prefix of every name; the state dict without it; and, if it holds several networks,
    {first part of the names: number of tensors}, else {}.
    """
    plain, start = {_without_compiled(name): t for name, t in state.items()}, ""
    state = plain if len(plain) == len(state) else state
    while found := [w for w in WRAPPERS if all(name.startswith(w) for name in state)]:
        state = {name.removeprefix(found[0]): t for name, t in state.items()}
        start += found[0]
    parts: dict[str, int] = {}
    for name in state:
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + 1
    if not any(name.startswith(WRAPPERS) for name in state):
        return start, state, {}
    if parts.keys() == {"backbone", "head"}:
        merged = {name.removeprefix("backbone."): t for name, t in state.items()}
        if len(merged) == len(state):
            return start, merged, {}
    return start, state, parts
