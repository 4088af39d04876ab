"""Checkpoints that are whole or not there, whatever happens while they are written."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

FORMAT = 1


def write_atomically(path: str | Path, write_to: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, then rename it.

    Args:
        path: The file.
        write_to: Called with the open binary file.

    Raises:
        OSError: It can't be written, such as for a full disk. An earlier file is then as it was,
            and nothing else is left.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")  # the same each time: a killed run leaves one
    try:
        with open(temporary, "wb") as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = ": the one before is kept" if path.exists() else ""
            raise OSError(f"{path} cannot be written{kept} ({error})") from error
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, or a power failure could undo the renaming of a file in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: str | Path, state: dict) -> None:
    """Save a dict of tensors, numbers, strings, lists and dicts.

    Raises:
        OSError: As for `write_atomically`.
    """
    buffer = io.BytesIO()  # for torch.save hides why a file can't be written
    torch.save(state | {"format": FORMAT}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str | Path) -> dict:
    """Load what `save` wrote, onto the CPU.

    Never unpickles anything but tensors and plain containers.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # garbage makes the unpickler raise anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"checkpoint {path}: is damaged, or none ({line})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"checkpoint {path}: format {found!r}, expected {FORMAT}")
    return state
