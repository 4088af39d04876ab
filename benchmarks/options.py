"""The command line of `pytest benchmarks/`."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import table5
from benchmarks.operations import NO_BACKWARD, QUANTIZED
from deit_fast.bench.measure import PROTOCOLS
from deit_fast.bench.modes import MODES, Mode, pick
from deit_fast.kernels.cases import DEIT

LATENCY_BATCHES = (1, 8, 32)
TRAIN_BATCHES = (64, 256)
TRAIN_ROWS = ["DeiT-Ti distilled", "DeiT-S distilled", "DeiT-B distilled"]
IMPLEMENTATIONS = ("eager", "compiled", "fused")
QUICK_ROWS = ["DeiT-Ti distilled", "ResNet-18"]
QUICK_MODES = [
    "eager_fp32", "deit_fast_fp32", "compile_bf16", "eager_fp32_train", "deit_fast_fp32_train",
]  # fmt: skip


@dataclass
class Options:
    """What is measured, and how; conftest.py says what each option means."""

    rows: list[table5.Entry]
    relatives: list[table5.Entry]
    modes: list[Mode]
    protocols: list[str]
    batch: int
    latency_batches: tuple[int, ...]
    train_rows: list[table5.Entry]
    train_batches: tuple[int, ...]
    max_batch: int
    runs: int
    warmup: int
    deadline: float
    out: Path
    again: bool
    profile: bool
    quick: bool = False

    @classmethod
    def parse(cls, get) -> "Options":
        """Read the options and fill in the defaults.

        Args:
            get: `get(name)` is the value given for --name, or None.

        Raises:
            ValueError: A name is unknown or a number is too small.
        """
        cuda, quick = torch.cuda.is_available(), bool(get("quick"))
        rows = _names(get("rows")) or (QUICK_ROWS if quick else None)
        modes = _names(get("modes")) or (QUICK_MODES if quick else list(MODES))
        protocols = _names(get("protocols")) or ["batch", "paper"]
        known = [p for p in PROTOCOLS if p not in ("latency", "step")]  # they have their files
        cap = 64 if quick else 1 << 20
        numbers = {
            "batch": 256, "max-batch": cap if cuda else min(cap, 2 if quick else 8),
            "runs": 3 if quick else 30, "warmup": 1 if quick else 10, "minutes": 1e6,
        }  # fmt: skip
        for name, default in numbers.items():
            given = get(name)
            numbers[name] = default if given is None else given
            least = int(name not in ("warmup", "minutes"))
            if numbers[name] < least:
                raise ValueError(f"--{name}: {given}, expected {least} or more")
        selected = table5.select(rows)
        relatives = [e for e in selected if e in table5.RELATIVES]
        if rows is None:
            relatives = list(table5.RELATIVES)
        train_rows = table5.select(rows or TRAIN_ROWS)
        if quick and not get("rows"):
            train_rows = table5.select(QUICK_ROWS[:1])
        asked = TRAIN_BATCHES if get("batch") is None else (numbers["batch"],)
        return cls(
            rows=[e for e in selected if e in table5.ENTRIES],
            relatives=relatives,
            modes=[MODES[name] for name in pick("modes", modes, MODES)],
            protocols=pick("protocols", protocols, known),
            batch=numbers["batch"],
            latency_batches=LATENCY_BATCHES[:1] if quick else LATENCY_BATCHES,
            train_rows=train_rows,
            train_batches=tuple(sorted({min(b, numbers["max-batch"]) for b in asked})),
            max_batch=numbers["max-batch"],
            runs=numbers["runs"],
            warmup=numbers["warmup"],
            deadline=time.monotonic() + 60 * numbers["minutes"],
            out=Path(get("out") or Path(__file__).with_name("results")),
            again=bool(get("again")),
            profile=bool(get("profile")),
            quick=quick,
        )

    def networks(self, train: bool = False) -> list[table5.Entry]:
        """The chosen rows of Table 5, each network and size once."""
        return table5.distinct(self.train_rows if train else self.rows)

    def implementations(self, op: str, others: tuple[str, ...], backward: bool) -> tuple[str, ...]:
        """Which implementations of an operation are compared.

        Args:
            op: Name of the operation.
            others: Its implementations beside PyTorch, compiled PyTorch and ours: forward only.
            backward: Whether it is forward and backward.
        """
        quick = ("eager", "fused")  # compiling takes seconds: that of one operation
        if not backward:
            if not self.quick or op == "layer_norm":
                return (*IMPLEMENTATIONS, *others)
            return quick if op in QUANTIZED else (*quick, *others)  # ten cases
        if op in NO_BACKWARD:
            return ()
        if self.quick:
            return quick if op == "layer_norm" else ()
        return IMPLEMENTATIONS

    def kernel_networks(self) -> list[str]:
        """The networks of cases.DEIT whose Table 5 row was chosen."""
        chosen = {e.network for e in self.rows}
        return [n for n in DEIT if f"DeiT-{n} distilled" in chosen]


def _names(text):
    return [name.strip() for name in text.split(",") if name.strip()] if text else None
