"""What kind of data set lies at a path, and which of its files make a split."""

import re
from pathlib import Path

from .image_set import data_error, listed, natural_order

# What a split's folders and files may be called: the first that is there is taken.
SPLITS = {"train": ("train",), "validation": ("val", "validation", "valid", "test", "t10k")}
_SPLIT_WORDS = {word for words in SPLITS.values() for word in words}
_IDX = re.compile(r".*-images[-.]idx3-ubyte(\.gz)?")


def find_files(path: Path, split: str | None) -> tuple[str, Path, list[Path]]:
    """Find what of `path` is meant.

    Returns:
        The kind ("folders", "tar", "parquet", "saved" or "idx"), the path that holds it, and its
        files: for "folders" the subfolders, for "saved" none.

    Raises:
        ValueError: Nothing is recognised, or more than one thing.
    """
    found = _files_by_kind(path)
    many = {kind: files for kind, files in found.items() if kind in ("tar", "parquet", "idx")}
    for word in SPLITS[split] if split is not None else ():
        by_kind = {kind: [f for f in files if word in _words(f)] for kind, files in many.items()}
        by_kind["folders"] = [path / word] if (path / word).is_dir() else []
        here = [(kind, files) for kind, files in by_kind.items() if files]
        if len(here) > 1:
            both = " and ".join(listed(files) for _, files in here)
            raise data_error(path, f"the split {word} could be {both}")
        for kind, files in here:
            return find_files(files[0], None) if kind == "folders" else (kind, path, files)
    there = listed(sorted(path.iterdir())) if path.is_dir() else "one file"
    if split is not None:
        names = ", ".join(SPLITS[split])
        raise data_error(path, f"no split {split!r} (named {names}), there is {there}")
    if (path / "dataset_dict.json").exists():
        raise data_error(path, f"holds splits, say which, there is {there}")
    if not found:
        expected = "folders of classes, .tar or .parquet files, a save_to_disk folder, or IDX files"
        raise data_error(path, f"nothing recognised, looked for {expected}, there is {there}")
    if len(found) > 1:
        both = " and ".join(f"{kind} ({listed(files)})" for kind, files in found.items())
        raise data_error(path, f"can be read in more than one way: {both}")
    kind, files = found.popitem()
    splits = sorted({word for file in many.get(kind, ()) for word in _words(file)} & _SPLIT_WORDS)
    if len(splits) > 1:
        raise data_error(path, f"holds the splits {', '.join(splits)}: say which")
    return kind, path, files


def _files_by_kind(path: Path) -> dict[str, list[Path]]:
    """{kind: files} of what lies at `path`; "folders" stands for its subfolders."""
    if (path / "state.json").exists():
        return {"saved": []}
    entries = [path] if path.is_file() else [e for e in path.iterdir() if e.name[0] != "."]
    entries.sort(key=lambda entry: natural_order(entry.name))
    found: dict[str, list[Path]] = {"tar": [], "parquet": [], "idx": [], "folders": []}
    for entry in entries:
        kind = "idx" if _IDX.fullmatch(entry.name) else entry.suffix.lower()[1:]
        kind = "folders" if entry.is_dir() else kind
        if kind in found:
            found[kind].append(entry)
    return {kind: files for kind, files in found.items() if files}


def _words(file: Path) -> set[str]:
    """Of "imagenet1k-train-0000.tar": imagenet1k, train, 0000, tar."""
    return set(re.split(r"[\W_]+", file.name.lower()))
