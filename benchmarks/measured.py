"""The results of one chip, looked up by what a table or a plot asks."""

from dataclasses import dataclass
from pathlib import Path
from statistics import correlation

from benchmarks.table5 import Entry, distinct
from deit_fast.bench import results
from deit_fast.bench.modes import MODES
from deit_fast.bench.results import KernelRow, ModelRow, Results

# Training: images/s of `OURS` over those of `RIVAL` that are wanted of an H100 or H200, at most its
# memory. Both are compiled into CUDA graphs
MARKS = {"DeiT-Ti distilled": 1.5, "DeiT-S distilled": 1.3, "DeiT-B distilled": 1.15}
OURS = "deit_fast_reduce_overhead_amp_bf16_train"
RIVAL = "compile_max_autotune_amp_bf16_train"
WORK = {"batch": "forward + backward", "step": "full step"}
# Inference in eight bits: images/s over those of our own bf16 that are wanted of fp8 on an H100 or
# H200 at this batch; and more than torchao's, whose mode and our engine's are CUDA graphs both
FP8_MARKS = {"DeiT-S": 1.3, "DeiT-B": 1.5, "DeiT-B-384": 1.5}
FP8_BATCH = 256
EIGHT_BITS = {
    "deit_fast bf16": "deit_fast_bf16", "fp8": "deit_fast_fp8", "int8": "deit_fast_int8",
    "fp8, attention too": "deit_fast_fp8_attention",
    "deit_fast bf16, engine": "deit_fast_engine_bf16", "fp8, engine": "deit_fast_engine_fp8",
    "torchao fp8, max-autotune": "torchao_fp8_compile",
}  # fmt: skip
# What a reader of that comparison has to know
NOT_ALIKE = (
    "fp8 here: two of the four products' operands have a scale a row, found at run time, those of "
    "proj and fc2 one for all, from a bound; torchao: a scale a row of all four. Ours runs the "
    "last block for the prefix tokens only. Python launches every kernel but in the engine and "
    "under max-autotune, which are CUDA graphs"
)

# Ratios that the marks are held against, and whose batch counts
MARKED = {"fp8 / bf16": "fp8", "engine fp8 / engine bf16": "fp8, engine"}


@dataclass(frozen=True)
class Chip:
    """Every results file of one folder."""

    folder: Path
    files: dict[str, Results]

    @classmethod
    def read(cls, folder: Path) -> "Chip":
        """Raises CorruptResults, naming the file."""
        paths = sorted(folder.glob("*.json"))
        return cls(folder, {path.stem: results.load(path) for path in paths})

    @property
    def newest(self) -> Results:
        """The file of the last run; of one day's, Table 5's."""
        return max(self.files.items(), key=lambda item: (item[1].date, item[0] == "table5"))[1]

    @property
    def name(self) -> str:
        hardware = self.newest.hardware
        return hardware["gpu"] or f"{hardware['cpu']} (CPU, {hardware['threads']} threads)"

    @property
    def is_cpu(self) -> bool:
        return self.newest.hardware["gpu"] is None

    @property
    def peak_rates(self) -> dict:
        return self.newest.peak_rates

    def is_old(self, row: ModelRow | KernelRow) -> bool:
        """Measured by another build than the last run's."""
        return row.build != self.newest.build

    @property
    def models(self) -> list[ModelRow]:
        return [r for file in self.files.values() for r in file.rows if isinstance(r, ModelRow)]

    @property
    def kernels(self) -> list[KernelRow]:
        return [r for file in self.files.values() for r in file.rows if isinstance(r, KernelRow)]

    def row(self, entry: Entry, mode: str, protocol: str, batch: int | None = None):
        """The row of a network in a mode: the newest build's before others, measured before failed
        ones, the largest batch; None where there is none."""
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
        """One for every network of a comparison: the paper's, unless more were measured at a given
        batch."""
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


def mark(entry: Entry, ours: ModelRow | None, rival: ModelRow | None) -> str:
    """What is wanted of two measured rows, and whether it is met: "" where nothing is, or where one
    is missing."""
    wanted, found = MARKS.get(entry.network), ratio(ours, rival)
    if wanted is None or found is None:
        return ""
    memory = ours.peak_memory_gb, rival.peak_memory_gb
    missed = ["speed"] * (found < wanted)
    missed += ["memory"] * (None not in memory and memory[0] > memory[1])
    return f"{wanted:.2f} {'met' if not missed else 'missed: ' + ', '.join(missed)}"


@dataclass(frozen=True)
class EightBits:
    """One network in eight bits: its rows by `EIGHT_BITS`, and what they say of each other."""

    entry: Entry
    rows: dict[str, ModelRow | None]
    ours: ModelRow  # what the line is about: fp8; int8 where only that is new, or was measured

    @classmethod
    def of(cls, chip: Chip, entry: Entry) -> "EightBits | None":
        """At the protocol "batch"; None where neither fp8 nor int8 was measured or failed."""
        rows = {name: chip.row(entry, mode, "batch") for name, mode in EIGHT_BITS.items()}
        ours = [r for r in (rows["fp8"], rows["int8"]) if r and r.status != "unavailable"]

        def rank(r):
            return not chip.is_old(r), r.status == "measured"

        return cls(entry, rows, max(ours, key=rank)) if ours else None

    @property
    def base(self) -> ModelRow:
        """What speeds are shown beside: `ours`, or where that failed another of that build."""
        rows = [self.ours, *filter(None, self.rows.values())]
        rows = [r for r in rows if r.build == self.ours.build and r.status == "measured"]
        return rows[0] if rows else self.ours

    @property
    def ratios(self) -> dict[str, float | None]:
        """How many times faster, None where nothing is to be said."""
        bf16, fp8, int8, _, engine_bf16, engine_fp8, torchao = self.rows.values()
        return {
            "fp8 / bf16": ratio(fp8, bf16),
            "engine fp8 / engine bf16": ratio(engine_fp8, engine_bf16),
            "int8 / bf16": ratio(int8, bf16), "fp8 / torchao": ratio(fp8, torchao),
            "engine fp8 / torchao": ratio(engine_fp8, torchao),
        }  # fmt: skip

    @property
    def verdicts(self) -> list[tuple[str, float | str | None]]:
        """(heading, ratio), and after a ratio of which something is wanted whether that is met; ""
        where nothing is wanted or known."""
        found = []
        for name, times in self.ratios.items():
            found.append((name, times))
            if name in MARKED:
                found.append(("wanted of an H100 or H200", self._mark(MARKED[name], times)))
        return [*found, ("wanted: over 1", self.race)]

    def _mark(self, fp8, times):
        wanted = FP8_MARKS.get(self.entry.network.removesuffix(" distilled"))
        if wanted is None or times is None or self.rows[fp8].batch != FP8_BATCH:
            return ""
        return f"{wanted:.2f} {'met' if times >= wanted else 'missed'}"

    @property
    def race(self) -> str:
        """Whether our engine is faster than torchao's mode, or why that is not known."""
        torchao, found = self.rows["torchao fp8, max-autotune"], self.ratios["engine fp8 / torchao"]
        if found is not None:
            return "met" if found > 1 else "missed"
        return f"{torchao.status}: {torchao.note}" if torchao and torchao.note else ""


def ratio(row: ModelRow | None, base: ModelRow | None) -> float | None:
    """How many times faster; None unless both were measured by one build at one batch. Of two runs,
    whose clocks may differ, each row counts in multiples of the baseline that was timed in turn
    with it; None where that is not the same mode."""
    if not (row and base and row.status == base.status == "measured"):
        return None
    if (row.build, row.batch, row.protocol) != (base.build, base.batch, base.protocol):
        return None
    if row.run == base.run:
        return row.images_per_s / base.images_per_s
    if None in (row.speedup, base.speedup) or row.baseline != base.baseline:
        return None
    return row.speedup / base.speedup


def rank_correlation(chip: Chip, entries: list[Entry]) -> tuple[float, int] | None:
    """Spearman's, between the paper's V100 throughputs and eager fp32 here; and of how many
    networks. A network in several rows counts once, with its first."""
    pairs = [
        (entry.v100_images_per_s, row.images_per_s)
        for entry in distinct(entries)
        if (row := chip.throughput(entry, "eager_fp32"))
    ]
    if len(pairs) < 3:
        return None
    ranks = [_ranks(column) for column in zip(*pairs, strict=True)]
    return correlation(*ranks), len(pairs)


def _ranks(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    return [
        (sum(v < x for v in values) + sum(v <= x for v in values) + 1) / 2 for x in values
    ]  # fmt: skip
