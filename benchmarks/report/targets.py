"""Speeds that are aimed at on an H100 or H200, and whether measured rows reach them."""

from dataclasses import dataclass

from benchmarks.measured import Chip, ratio
from benchmarks.table5 import Entry
from deit_fast.bench.results import ModelRow

HEADING = "target on an H100 or H200"
# Training: images/s of `OURS` over those of `BASELINE`, at no more memory. Both are compiled into
# CUDA graphs
TARGETS = {"DeiT-Ti distilled": 1.5, "DeiT-S distilled": 1.3, "DeiT-B distilled": 1.15}
OURS = "deit_fast_reduce_overhead_amp_bf16_train"
BASELINE = "compile_max_autotune_amp_bf16_train"
WORK = {"batch": "forward + backward", "step": "full step"}
# Quantized inference: images/s of fp8 over those of our own bf16 at this batch; and more than
# torchao's, whose mode is CUDA graphs as our engine is
FP8_TARGETS = {"DeiT-S": 1.3, "DeiT-B": 1.5, "DeiT-B-384": 1.5}
FP8_BATCH = 256
QUANTIZED_MODES = {
    "deit_fast bf16": "deit_fast_bf16", "fp8": "deit_fast_fp8", "int8": "deit_fast_int8",
    "fp8, attention too": "deit_fast_fp8_attention",
    "deit_fast bf16, engine": "deit_fast_engine_bf16", "fp8, engine": "deit_fast_engine_fp8",
    "torchao fp8, max-autotune": "torchao_fp8_compile",
}  # fmt: skip
# What a reader of that comparison has to know
DIFFERENCES = (
    "in fp8 here the operands of two of a block's four GEMMs have dynamic per-row scales, those of "
    "proj and fc2 a static per-tensor scale derived from a bound; torchao: dynamic per-row scales "
    "for all four. Ours runs the last block for the prefix tokens only. Kernels are eager launches "
    "but in the engine and under max-autotune, which replay CUDA graphs"
)
# Ratios that have a target, and the mode whose batch counts
WITH_TARGET = {"fp8 / bf16": "fp8", "engine fp8 / engine bf16": "fp8, engine"}


def training_target(entry: Entry, ours: ModelRow | None, baseline: ModelRow | None) -> str:
    """The target of a network's training and whether two rows reach it.

    Args:
        entry: The network.
        ours: Its row in the mode `OURS`.
        baseline: Its row in the mode `BASELINE`.

    Returns:
        Such as "1.30 met" or "1.30 missed: memory"; "" where there is no target or a row is
        missing.
    """
    target, found = TARGETS.get(entry.network), ratio(ours, baseline)
    if target is None or found is None:
        return ""
    memory = ours.peak_memory_gb, baseline.peak_memory_gb
    missed = ["speed"] * (found < target)
    missed += ["memory"] * (None not in memory and memory[0] > memory[1])
    return f"{target:.2f} {'met' if not missed else 'missed: ' + ', '.join(missed)}"


@dataclass(frozen=True)
class QuantizedComparison:
    """One quantized network beside bf16 and torchao.

    Attributes:
        entry: The network.
        rows: Its row, or None, for each of `QUANTIZED_MODES`.
        ours: What the line is about: fp8; int8 where only that is new, or was measured.
    """

    entry: Entry
    rows: dict[str, ModelRow | None]
    ours: ModelRow

    @classmethod
    def of(cls, chip: Chip, entry: Entry) -> "QuantizedComparison | None":
        """At the protocol "batch"; None where neither fp8 nor int8 was measured or failed."""
        rows = {name: chip.row(entry, mode, "batch") for name, mode in QUANTIZED_MODES.items()}
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
        """How many times faster; None where the rows cannot be compared."""
        bf16, fp8, int8, _, engine_bf16, engine_fp8, torchao = self.rows.values()
        return {
            "fp8 / bf16": ratio(fp8, bf16),
            "engine fp8 / engine bf16": ratio(engine_fp8, engine_bf16),
            "int8 / bf16": ratio(int8, bf16), "fp8 / torchao": ratio(fp8, torchao),
            "engine fp8 / torchao": ratio(engine_fp8, torchao),
        }  # fmt: skip

    @property
    def columns(self) -> list[tuple[str, float | str | None]]:
        """(heading, ratio), and after a ratio with a target whether that is met.

        "" where there is no target or it is not known.
        """
        found: list[tuple[str, float | str | None]] = []
        for name, times in self.ratios.items():
            found.append((name, times))
            if name in WITH_TARGET:
                found.append((HEADING, self._target(WITH_TARGET[name], times)))
        return [*found, ("target: over 1", self.against_torchao)]

    def _target(self, fp8, times):
        target = FP8_TARGETS.get(self.entry.network.removesuffix(" distilled"))
        if target is None or times is None or self.rows[fp8].batch != FP8_BATCH:
            return ""
        return f"{target:.2f} {'met' if times >= target else 'missed'}"

    @property
    def against_torchao(self) -> str:
        """Whether our engine is faster than torchao's mode, or why that is not known."""
        torchao, found = self.rows["torchao fp8, max-autotune"], self.ratios["engine fp8 / torchao"]
        if found is not None:
            return "met" if found > 1 else "missed"
        return f"{torchao.status}: {torchao.note}" if torchao and torchao.note else ""
