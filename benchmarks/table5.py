"""Table 5 of the DeiT paper (Touvron et al., 2021) as data: accuracies and V100 throughputs.

And relatives, other transformers that deit_fast serves, with TinyViT's throughputs (Wu et al.,
2022).
"""

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from deit_fast.bench.modes import pick


@dataclass(frozen=True)
class Entry:
    """One row of Table 5, or of its relatives.

    Attributes:
        network: The paper's name.
        family: "convnet" or "transformer".
        params_m: Millions of parameters.
        image_size: Pixels.
        gmacs: Billions of multiply-adds of one image's forward pass: convolutions and matmuls.
        v100_images_per_s: Of the paper: fp32, largest batch, mean of 30 runs; None: not given.
        imagenet_top1: Percent; None: not given.
        timm_name: timm's name of the model.
    """

    network: str
    family: str
    params_m: int
    image_size: int
    gmacs: float
    v100_images_per_s: float | None
    imagenet_top1: float | None
    timm_name: str

    @property
    def measured_as(self) -> tuple[str, int]:
        """Rows of the same network at the same size share one measurement."""
        return self.timm_name, self.image_size


def _read(name):
    with Path(__file__).with_name(name).open() as file:
        for row in csv.DictReader(file):
            known = {f.name: row[f.name] for f in fields(Entry)}
            for number in ("v100_images_per_s", "imagenet_top1"):
                known[number] = float(known[number]) if known[number] else None
            for number in ("params_m", "image_size"):
                known[number] = int(known[number])
            known["gmacs"] = float(known["gmacs"])
            yield Entry(**known)


ENTRIES = tuple(_read("table5.csv"))
RELATIVES = tuple(_read("relatives.csv"))
DISTILLED = {
    "Ti": "deit_tiny_distilled", "S": "deit_small_distilled", "B": "deit_base_distilled",
    "B-384": "deit_base_distilled_384",
}  # fmt: skip


def select(names: list[str] | None) -> list[Entry]:
    """The rows with those names.

    Args:
        names: Of networks, of timm models or of families, which are Table 5's alone; None: all of
            Table 5.

    Raises:
        ValueError: A name is unknown.
    """
    if names is None:
        return list(ENTRIES)
    known = {e: {e.network.lower(), e.timm_name, e.family} for e in ENTRIES}
    known |= {e: {e.network.lower(), e.timm_name} for e in RELATIVES}
    every = dict.fromkeys(name for names in known.values() for name in sorted(names))
    chosen = set(pick("rows", [name.lower() for name in names], every))
    return [e for e, names in known.items() if names & chosen]


def distinct(entries: list[Entry]) -> list[Entry]:
    """The first row of each network and size."""
    return list({e.measured_as: e for e in reversed(entries)}.values())[::-1]
