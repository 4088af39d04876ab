"""The files of a model: in a folder, or fetched from the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from deit_fast.stored_model import first_line

PICKLED = "pytorch_model.bin"  # what transformers and timm wrote before safetensors
# name or owner/name, with a @revision. Paths such as "./x", "/x" and "~/x" do not match
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@.+)?")

Fetch = Callable[[str], Path | None]


def open_source(path_or_hub_id: str | Path) -> tuple[Fetch, str]:
    """Decide where a model's files come from.

    Args:
        path_or_hub_id: See `deit_fast.from_pretrained`.

    Returns:
        A function from the name of a file to its path, or to None if there is none; and what to
        call the source in errors. The function raises FileNotFoundError if the hub can't be asked.

    Raises:
        FileNotFoundError: For what is neither a folder nor a hub id.
        ValueError: For a file.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return lambda name: path if (path := folder / name).is_file() else None, str(folder)
    if folder.exists():
        raise ValueError(
            f"{folder}: is a file, expected a folder (create_model(name, checkpoint=FILE) loads a "
            "file)"
        )
    text = path_or_hub_id if isinstance(path_or_hub_id, str) else ""
    if not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"{path_or_hub_id}: no such folder (and no Hugging Face hub id)")
    repo, _, revision = text.partition("@")

    def fetch(name: str) -> Path | None:
        if name == PICKLED:  # from the hub never a pickle
            return None
        reason: Exception
        try:
            return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision or None))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                return None
            reason = error
        except Exception as error:  # the hub's errors have no common class
            reason = error
        raise FileNotFoundError(
            f"{text}: no such folder, and {name} did not come from the Hugging Face hub "
            f"(offline, or no such model? {first_line(reason)})"
        ) from reason

    return fetch, text
