"""Table 5 of the DeiT paper (Touvron et al., 2021) as data: accuracies and V100 throughputs."""

import csv
from dataclasses import dataclass
from pathlib import Path

from deit_fast.bench.modes import pick


@dataclass(frozen=True)
class Entry:
    """One row. image_size in pixels; v100_images_per_s: fp32, largest batch, mean of 30 runs."""

    network: str
    family: str
    params_m: int
    image_size: int
    v100_images_per_s: float
    imagenet_top1: float
    timm_name: str

    @property
    def measured_as(self) -> tuple[str, int]:
        """Rows of the same network at the same size share one measurement."""
        return self.timm_name, self.image_size


def _read():
    with Path(__file__).with_name("table5.csv").open() as file:
        for row in csv.DictReader(file):
            values = {name: kind(row[name]) for name, kind in Entry.__annotations__.items()}
            yield Entry(**values)


ENTRIES = tuple(_read())


def select(names: list[str] | None) -> list[Entry]:
    """The rows with those names: of a network, of a timm model or of a family; None: all. Raises
    ValueError for an unknown name."""
    if names is None:
        return list(ENTRIES)
    known = {e.network.lower(): e for e in ENTRIES}
    known |= {name: None for e in ENTRIES for name in (e.timm_name, e.family)}
    wanted = set(pick("rows", [name.lower() for name in names], known))
    return [e for e in ENTRIES if {e.network.lower(), e.timm_name, e.family} & wanted]


def distinct(entries: list[Entry]) -> list[Entry]:
    """The first row of each network and size."""
    return list({e.measured_as: e for e in reversed(entries)}.values())[::-1]
