"""State dicts out of the files that trainers write: which entry, and which part of its names."""

import pickle
import re
import threading
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .allowed import ALLOWED

PLACES = ("model", "state_dict", "model_state_dict")  # where most trainers have the weights
# What modules around a model put before its names: DistributedDataParallel, Lightning, DINO. No
# model of timm's has a name that begins so
WRAPPERS = ("module.", "model.", "backbone.", "student.", "teacher.")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # torch.compile's, of the model or of a part

_ALLOWING = threading.Lock()  # what torch.load allows is the process's, not the call's
_DEEPEST, _LISTED = 3, 8  # keys on the way to an entry that is looked for; entries in an error


def read_checkpoint(path: str | Path, checkpoint_key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in what `torch.save` wrote, in any of its formats
    but the tar of 2016: alone, or in a trainer's checkpoint.

    checkpoint_key: the entry that holds it, such as "model_ema" or "teacher", or keys on the way to
    it with dots between them. Behind the last key names of tensors may follow, as far as they are
    common: "state_dict.student" is what begins with "student." there, without it. None: the usual
    entry, "model", "state_dict" or "model_state_dict".

    What wrappers put before every name is left out: "module.", "_orig_mod.", "model.", "backbone.",
    "student.", "teacher.", in any order; "_orig_mod." anywhere. Of a "backbone." beside a "head."
    (DINO's) both parts are kept.

    Nothing in the file is run, but for classes that the program itself gave to
    `torch.serialization.add_safe_globals`. Objects that are known by name (`allowed.py`:
    argparse.Namespace, numpy's numbers, paths, ...) are left out; with any other the file is
    refused.

    Raises FileNotFoundError, or ValueError with one line: for a file that is no such checkpoint, an
    object that is refused, by name, and an entry that is not there or not the only one, with a list
    of those that are.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint: {path} {_refusal(str(error))}") from error
    except Exception as error:  # garbage makes the unpickler raise anything
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


def _load(path):
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with _ALLOWING, torch.serialization.safe_globals(ALLOWED):
        return torch.load(path, map_location="cpu", weights_only=True)


def _refusal(message):
    if found := re.search(r"GLOBAL (\S+)", message):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"  # torch leaves that out
        return (
            f"holds more than tensors: {ascii(name)[1:-1][:80]} is refused, and nothing in the file"
            " was run; what torch.save(model.state_dict(), FILE) writes holds tensors alone"
        )
    if "Unsupported operand" in message:
        return "is no checkpoint (or in another pickle protocol than torch.save's own, 2)"
    return "holds more than tensors: not loaded, and nothing in the file was run"


def _damage(message):
    if "legacy .tar format" in message:
        return "is in torch's tar format of 2016: no longer read"
    if "TorchScript" in message:
        return "is a TorchScript archive, a program: expected the state_dict() of what it holds"
    reason = message.strip().splitlines()[0][:120] if message.strip() else "empty file"
    return f"is truncated or no checkpoint ({reason})"


# Which entry


def _is_state_dict(content):
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) for name in content)
        and all(map(torch.is_tensor, content.values()))
    )


def _at(content, key):
    """What is under a dotted key, or behind a common beginning of names; None if nothing is."""
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


def _usual(content):
    """What is in the usual place, and in the usual place there."""
    for _ in range(_DEEPEST):
        if not isinstance(content, dict):
            break
        places = [place for place in PLACES if _choices(content.get(place))]
        if len(places) != 1:
            break
        content = content[places[0]]
    return content


def _choices(content):
    """{checkpoint_key: number of tensors} of the networks in a checkpoint."""
    found, seen, entries = {}, set(), [((), content)]
    for keys, entry in entries:  # which grows
        if not isinstance(entry, dict) or id(entry) in seen:
            continue
        seen.add(id(entry))  # a dict may hold itself
        if _is_state_dict(entry) and any(t.dim() for t in entry.values()):  # not only scores
            start, state, parts = _unwrapped(entry)
            key = ".".join((*keys, *filter(None, start.split("."))))
            many = {f"{key}.{part}" if key else part: number for part, number in parts.items()}
            found |= many or {".".join(keys): len(state)}
        elif len(keys) < _DEEPEST:
            entries += [((*keys, k), e) for k, e in entry.items() if isinstance(k, str)]
    return found


def _listing(found):
    if list(found) == [""]:
        return "for it is a single state dict: leave checkpoint_key out"
    largest = sorted(found, key=found.get, reverse=True)
    shown = [f"{key!r} ({found[key]} tensor{'s'[: found[key] - 1]})" for key in largest[:_LISTED]]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"expected as checkpoint_key one of {', '.join(shown)}{more}"


# Which part of the names


def _without_compiled(name):
    return _COMPILED.sub("", name)


def _unwrapped(state):
    """(what stood before every name, the state dict without it, {first part of the names: number}
    if these are several networks, else {})"""
    plain, start = {_without_compiled(name): t for name, t in state.items()}, ""
    state = plain if len(plain) == len(state) else state
    while found := [w for w in WRAPPERS if all(name.startswith(w) for name in state)]:
        state = {name.removeprefix(found[0]): t for name, t in state.items()}
        start += found[0]
    parts = {}
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
