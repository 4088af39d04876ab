"""Checkpoints that are whole or not there, whatever happens while they are written."""

import io
import os
from pathlib import Path

import torch

FORMAT = 1


def write(path: str | Path, write_to) -> None:
    """`write_to(binary file)` to another name, then renamed. Raises OSError with the reason (a full
    disk), and then an earlier file is as it was and nothing else is left."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")  # the same each time: a killed run leaves one
    try:
        with open(temporary, "wb") as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power failure could undo the renaming
        finally:
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = ": the one before is kept" if path.exists() else ""
            raise OSError(f"{path} cannot be written{kept} ({error})") from error
        raise


def save(path: str | Path, state: dict) -> None:
    """Of tensors, numbers, strings, lists and dicts. Raises OSError as `write`."""
    buffer = io.BytesIO()  # for torch.save hides why a file can't be written
    torch.save(state | {"format": FORMAT}, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str | Path) -> dict:
    """What `save` wrote, on the CPU. Never unpickles anything but tensors and plain containers.
    Raises ValueError for a file that is damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # garbage makes the unpickler raise anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"checkpoint {path}: is damaged, or none ({line})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        came = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"checkpoint {path}: format {came!r}, expected {FORMAT}")
    return state
