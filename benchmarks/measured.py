"""The results of one chip, looked up by what a table or a plot asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation

from benchmarks.table5 import Entry, distinct
from deit_fast.bench import results
from deit_fast.bench.modes import MODES
from deit_fast.bench.results import KernelRow, ModelRow, Results


@dataclass(frozen=True)
class Chip:
    """Every results file of one chip's folder."""

    folder: Path
    files: dict[str, Results]

    @classmethod
    def read(cls, folder: Path) -> "Chip":
        """Read all results files of a folder.

        Raises:
            CorruptResults: A file is damaged; the message names it.
        """
        return cls(folder, {path.stem: results.load(path) for path in results.paths(folder)})

    @property
    def newest(self) -> Results:
        """The file of the last run; of one day's, Table 5's."""
        return max(self.files.items(), key=lambda item: (item[1].date, item[0] == "table5"))[1]

    @property
    def name(self) -> str:
        """The GPU, or the CPU with its threads."""
        hardware = self.newest.hardware
        return hardware["gpu"] or f"{hardware['cpu']} (CPU, {hardware['threads']} threads)"

    @property
    def is_cpu(self) -> bool:
        """Whether no GPU was there: such figures claim nothing."""
        return self.newest.hardware["gpu"] is None

    @property
    def peak_rates(self) -> dict:
        """Measured with the last run."""
        return self.newest.peak_rates

    def is_old(self, row: ModelRow | KernelRow) -> bool:
        """Measured by another build than the last run's."""
        return row.build != self.newest.build

    @property
    def models(self) -> list[ModelRow]:
        """The rows of networks, of all files."""
        return [r for file in self.files.values() for r in file.rows if isinstance(r, ModelRow)]

    @property
    def kernels(self) -> list[KernelRow]:
        """The rows of operations, of all files."""
        return [r for file in self.files.values() for r in file.rows if isinstance(r, KernelRow)]

    def row(self, entry: Entry, mode: str, protocol: str, batch: int | None = None):
        """The row of a network in a mode; None where there is none.

        The newest build's goes before others, a measured one before failed ones, the largest
        batch first.
        """
        found = [
            r
            for r in self.models
            if (r.timm_name, r.image_size) == entry.measured_as
            and (r.mode, r.protocol) == (mode, protocol)
            and batch in (None, r.batch)
        ]

        def rank(r):
            return not self.is_old(r), r.status == "measured", r.batch

        return max(found, key=rank, default=None)

    def batches(self, entry: Entry, protocol: str, train: bool) -> list[int]:
        """Those that some mode of that kind was measured or failed at."""
        return sorted({
            r.batch
            for r in self.models
            if (r.timm_name, r.image_size, r.protocol) == (*entry.measured_as, protocol)
            and MODES[r.mode].train == train
            and r.status != "unavailable"
        })  # fmt: skip

    @property
    def protocol(self) -> str:
        """The protocol of every network in a comparison.

        The paper's, unless more networks were measured at a given batch.
        """
        rows = [r for r in self.models if r.mode == "eager_fp32" and r.status == "measured"]
        given = sum(r.protocol == "batch" for r in rows)
        return "batch" if given > sum(r.protocol == "paper" for r in rows) else "paper"

    def throughput(self, entry: Entry, mode: str) -> ModelRow | None:
        """The measured row by that protocol."""
        row = self.row(entry, mode, self.protocol)
        return row if row and row.status == "measured" else None

    def modes(self, protocol: str, train: bool = False) -> list[str]:
        """The modes that some network was measured or failed in, in their order."""
        seen = {
            r.mode for r in self.models if r.protocol == protocol and r.status != "unavailable"
        }  # fmt: skip
        return [name for name, mode in MODES.items() if name in seen and mode.train == train]


def ratio(row: ModelRow | None, base: ModelRow | None) -> float | None:
    """How many times faster a row is than another.

    Of two runs, whose clocks may differ, each row counts in multiples of the baseline that was
    timed in turn with it.

    Returns:
        None unless both were measured by one build at one batch, and of two runs beside the same
        baseline.
    """
    if not (row and base and row.status == base.status == "measured"):
        return None
    if (row.build, row.batch, row.protocol) != (base.build, base.batch, base.protocol):
        return None
    if row.run == base.run:
        return row.images_per_s / base.images_per_s
    if None in (row.speedup, base.speedup) or row.baseline != base.baseline:
        return None
    return row.speedup / base.speedup


def rank_correlation(
    chip: Chip, entries: list[Entry], protocol: str | None = None
) -> tuple[float, int] | None:
    """Spearman's rank correlation of the paper's V100 throughputs and eager fp32 here.

    A network in several rows counts once, with its first.

    Args:
        chip: What was measured.
        entries: Rows of Table 5.
        protocol: By which the rows here were measured; None for that of `Chip.protocol`.

    Returns:
        The correlation and of how many networks; None of fewer than three.
    """
    rows = [
        (entry, chip.row(entry, "eager_fp32", protocol or chip.protocol))
        for entry in distinct(entries)
    ]
    pairs = [
        (entry.v100_images_per_s, row.images_per_s)
        for entry, row in rows
        if row and row.status == "measured"
    ]
    return (spearman(*zip(*pairs, strict=True)), len(pairs)) if len(pairs) >= 3 else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation: that of the ranks; equal values share the mean of their ranks.

    Args:
        x: At least two numbers, not all equal.
        y: As many.
    """
    ranks = [
        [(sum(v < n for v in column) + sum(v <= n for v in column) + 1) / 2 for n in column]
        for column in (x, y)
    ]
    return correlation(*ranks)
