"""What kind of data set lies at a path, and which of its files make a split."""

import re
from pathlib import Path

from .image_set import SPLIT_WORDS, SPLITS, data_error, listed, natural_order
from .table import is_table, split_word, splits_of

MANY = ("table", "tar", "parquet", "idx")  # kinds of which a split may be files, by their names
_IDX = re.compile(r".*-images[-.]idx3-ubyte(\.gz)?")


def find_files(
    path: Path, split: str | None, image_key: str = "image", label_key: str = "label"
) -> tuple[str, Path, list[Path]]:
    """Find what of `path` is meant.

    Args:
        path: A file or folder.
        split: "train", "validation" or None, see `datasets.open_images`.
        image_key: Tells a table, see `datasets.open_images`.
        label_key: Tells a table.

    Returns:
        The kind ("folders", "table", "tar", "parquet", "saved" or "idx"), the path that holds it,
        and its files: for "folders" the subfolders, for "saved" none. Of a "table" those that hold
        the split, perhaps in some of their rows.

    Raises:
        ValueError: Nothing is recognised, or more than one thing.
    """
    keys = image_key, label_key
    found = _files_by_kind(path, keys)
    many = {kind: files for kind, files in found.items() if kind in MANY}
    for word in SPLITS[split] if split is not None else ():
        by_kind = {kind: [f for f in files if word in _words(f)] for kind, files in many.items()}
        by_kind["folders"] = [path / word] if (path / word).is_dir() else []
        here = [(kind, files) for kind, files in by_kind.items() if files]
        if len(here) > 1:
            both = " and ".join(listed(files) for _, files in here)
            raise data_error(path, f"the split {word} could be {both}")
        for kind, files in here:
            return find_files(files[0], None, *keys) if kind == "folders" else (kind, path, files)
    if list(found) == ["table"] and (words := splits_of(found["table"], *keys)) is not None:
        if split is not None and split_word(words, split) is None:
            names, there = ", ".join(SPLITS[split]), ", ".join(sorted(words))
            reason = f"no split {split!r} (named {names}), in the column split there is {there}"
            raise data_error(path, reason)
        if split is None and len(words) > 1:
            raise data_error(path, f"holds the splits {', '.join(sorted(words))}: say which")
        return "table", path, found["table"]
    there = listed(sorted(path.iterdir())) if path.is_dir() else "one file"
    if split is not None:
        names = ", ".join(SPLITS[split])
        raise data_error(path, f"no split {split!r} (named {names}), there is {there}")
    if (path / "dataset_dict.json").exists():
        raise data_error(path, f"holds splits, say which, there is {there}")
    if not found:
        expected = (
            "folders of classes, .csv files with the columns path and label, .tar or .parquet "
            "files, a save_to_disk folder, or IDX files"
        )
        raise data_error(path, f"nothing recognised, looked for {expected}, there is {there}")
    if len(found) > 1:
        both = " and ".join(f"{kind} ({listed(files)})" for kind, files in found.items())
        raise data_error(path, f"can be read in more than one way: {both}")
    kind, files = found.popitem()
    splits = sorted({word for file in many.get(kind, ()) for word in _words(file)} & SPLIT_WORDS)
    if len(splits) > 1:
        raise data_error(path, f"holds the splits {', '.join(splits)}: say which")
    return kind, path, files


def _files_by_kind(path: Path, keys: tuple[str, str]) -> dict[str, list[Path]]:
    """{kind: files} of what lies at `path`; "folders" stands for its subfolders."""
    if (path / "state.json").exists():
        return {"saved": []}
    entries = [path] if path.is_file() else [e for e in path.iterdir() if e.name[0] != "."]
    entries.sort(key=lambda entry: natural_order(entry.name))
    found: dict[str, list[Path]] = {kind: [] for kind in (*MANY, "folders")}
    for entry in entries:
        kind = "idx" if _IDX.fullmatch(entry.name) else entry.suffix.lower()[1:]
        kind = "folders" if entry.is_dir() else kind
        if kind in ("csv", "parquet") and is_table(entry, *keys):
            kind = "table"
        elif kind == "csv" and entry == path:
            kind = "table"  # whose error says which column it lacks
        if kind in found:
            found[kind].append(entry)
    if found["table"] and not any(folder.name in SPLIT_WORDS for folder in found["folders"]):
        found["folders"] = []  # they hold the images that the table names
    return {kind: files for kind, files in found.items() if files}


def _words(file: Path) -> set[str]:
    """Of "imagenet1k-train-0000.tar": imagenet1k, train, 0000, tar."""
    return set(re.split(r"[\W_]+", file.name.lower()))
