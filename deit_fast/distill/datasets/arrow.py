"""Hugging Face datasets: .parquet files, or what `save_to_disk` wrote."""

import io
import re
from pathlib import Path

import numpy as np

from .image_set import ImageSet, data_error, match_classes


class ArrowImages(ImageSet):
    """A Hugging Face dataset, memory-mapped; `files` None: of save_to_disk, else .parquet."""

    def __init__(
        self, path: Path, files: list[Path] | None, mode: str, classes: list[str] | None,
        image_key: str, label_key: str,
    ):  # fmt: skip
        try:
            import datasets
        except ImportError as error:
            reason = f"data {path}: needs the package datasets: pip install 'deit_fast[train]'"
            raise RuntimeError(reason) from error
        try:
            if files is None:
                data = datasets.load_from_disk(str(path))
            else:
                names = [str(file) for file in files]
                data = datasets.load_dataset("parquet", data_files=names, split="train")
        except (datasets.exceptions.DatasetsError, ValueError, IndexError) as error:
            # IndexError: what load_from_disk makes of a dataset without a row
            raise data_error(path, f"can't be read: {error.__cause__ or error}") from error
        for option, key in (("image_key", image_key), ("label_key", label_key)):
            if key not in data.column_names:
                there = ", ".join(data.column_names)
                raise data_error(path, f"{option}: no column {key!r}, there is {there}")
        if not len(data):
            raise data_error(path, "no image")
        image, label = data.features[image_key], data.features[label_key]
        self.path, self.key, self.data = path, image_key, data.select_columns([image_key])
        if isinstance(image, datasets.Image):  # decode=False: errors of decoding are ours to report
            self.data = self.data.cast_column(image_key, datasets.Image(decode=False))
        elif not (isinstance(image, dict) and "bytes" in image or "binary" in str(image)):
            raise data_error(path, f"image_key: {image_key!r} holds {image}, expected images")
        class_names = label.names if isinstance(label, datasets.ClassLabel) else None
        if class_names is None and not re.match("u?int", getattr(label, "dtype", None) or ""):
            raise data_error(path, f"label_key: {label_key!r} holds {label}, expected integers")
        labels = data.select_columns([label_key]).with_format("arrow")[:][label_key]
        if labels.null_count:
            raise data_error(self.name(labels.is_null().to_pylist().index(True)), "no label")
        labels = labels.to_numpy().astype(np.int64)
        super().__init__(*match_classes(path, labels, class_names, classes, self.name), mode)

    def name(self, i: int) -> str:
        """The path of the dataset and the row of image i."""
        return f"{self.path}: image {int(i)}"

    def _file(self, i: int) -> str | io.BytesIO | None:
        value = self.data[int(i)][self.key]
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        return io.BytesIO(value) if isinstance(value, bytes) else value
