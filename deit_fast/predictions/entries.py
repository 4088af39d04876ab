"""Predictions as plain dicts, one for each image."""

from collections.abc import Iterator, Sequence
from typing import Any

from deit_fast.batch_inference import Batch


def entries(batch: Batch, labels: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the predictions of a batch as dicts that JSON can hold.

    Args:
        batch: What `deit_fast.batch_inference.predict` yielded.
        labels: The names of the classes; needed unless the batch holds embeddings.

    Yields:
        For each image {"image", "predictions": [{"class", "label", "score"}, ...]}, best first,
        and "unknown" where that was asked of the predictor: true, if no prediction is left; for an
        unreadable one {"image", "error"}; {"image"} if the batch holds embeddings.
    """
    row = 0
    names: Any = labels  # None only with embeddings, which have no classes
    for path, reason in zip(batch.paths, batch.reasons, strict=True):
        if reason is not None:
            yield {"image": path, "error": reason}
            continue
        entry: dict[str, Any] = {"image": path}
        if "classes" in batch.columns:
            found = zip(batch.columns["classes"][row], batch.columns["scores"][row], strict=True)
            entry["predictions"] = [
                {"class": int(i), "label": names[i], "score": round(float(s), 6)}
                for i, s in found
                if i >= 0
            ]
        if "unknown" in batch.columns:
            entry["unknown"] = bool(batch.columns["unknown"][row])
        row += 1
        yield entry
