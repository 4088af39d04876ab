"""ReaL: ImageNet's validation images with every class that is right for them.

Beyer et al., "Are we done with ImageNet?" (2020); the column "Real" of the DeiT paper's Table 10. A
prediction is right if it is among them; images for which none is right are left out.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

_NUMBER = re.compile(r"_val_(\d{8})(?!\d)")


def read_real_labels(path: str | Path) -> list[list[int]]:
    """Read the right classes of each validation image, in order, from the authors' real.json.

    Raises:
        ValueError: The file is not a list of lists of ints from 0.
        OSError: It can't be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            found = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(found, list):
        raise ValueError(
            f"{path}: holds a {type(found).__name__}, expected a list of lists of ints"
        )
    for i, labels in enumerate(found, 1):
        if not isinstance(labels, list) or not all(type(c) is int and c >= 0 for c in labels):
            raise ValueError(
                f"{path}: image {i} has {labels!r:.60}, expected a list of ints from 0"
            )
    return found


def real_truths(real: list[list[int]], names: Iterable[str]) -> list[list[int]]:
    """Look up the right classes of images by their names.

    Args:
        real: From `read_real_labels`.
        names: ILSVRC2012_val_XXXXXXXX, with a number from 1.

    Raises:
        ValueError: A name has no number, or one out of range.
    """
    truths = []
    for name in names:
        found = _NUMBER.search(PurePath(name).name)
        if found is None:
            raise ValueError(
                f"{name}: has no number, expected a name as ILSVRC2012_val_00000001.JPEG"
            )
        if not 1 <= int(found[1]) <= len(real):
            raise ValueError(f"{name}: number {int(found[1])}, expected one from 1 to {len(real)}")
        truths.append(real[int(found[1]) - 1])
    return truths
