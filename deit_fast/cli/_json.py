"""What --json writes: one JSON document, to a file, or alone on standard output."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from .parsers._options import STDOUT


@contextmanager
def output(target: Path | None) -> Iterator[Callable[[Any], None]]:
    """Yield a function that writes a document where --json says.

    Until the end, what would go to standard output goes to standard error where the document is to
    go there.

    Args:
        target: A file; `STDOUT`; None for nowhere.

    Raises:
        IsADirectoryError: The file is a folder.
    """
    if target is None:
        yield lambda document: None
    elif target == STDOUT:
        out = sys.stdout
        with redirect_stdout(sys.stderr):
            yield lambda document: print(_text(document), file=out, flush=True)
    else:
        if target.is_dir():
            raise IsADirectoryError(f"--json: {target} is a folder, expected a file")
        yield lambda document: _save(document, target)


def _text(document: Any) -> str:
    return json.dumps(document, indent=1, default=str)


def _save(document: Any, path: Path) -> None:
    """Write a temporary file beside `path`, then rename it: never half a file."""
    text = _text(document) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
