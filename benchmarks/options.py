"""The command line of `pytest benchmarks/`."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import table5
from benchmarks.operations import NO_BACKWARD, QUANTIZED
from deit_fast.bench.measure import PROTOCOLS
from deit_fast.bench.modes import MODES, Mode, pick
from deit_fast.kernels.cases import DEIT

RESULTS = Path(__file__).with_name("results")
LATENCY_BATCHES = (1, 8, 32)
TRAIN_BATCHES = (64, 256)
TRAIN_ROWS = ["DeiT-Ti distilled", "DeiT-S distilled", "DeiT-B distilled"]
IMPLEMENTATIONS = ("eager", "compiled", "fused")
QUICK_ROWS = ["DeiT-Ti distilled", "ResNet-18"]
CPU_MODES = ["eager_fp32", "deit_fast_fp32", "eager_fp32_train", "deit_fast_fp32_train"]
QUICK_MODES = [*CPU_MODES, "compile_bf16"]
# Of Table 5 on a CPU the quick set has these too, at a given batch and by CPU_MODES alone
QUICK_ROWS_CPU = [
    "ResNet-50", "RegNetY-4GF", "EfficientNet-B0", "EfficientNet-B1", "DeiT-Ti", "DeiT-S",
    "DeiT-B",
]  # fmt: skip
CPU_BATCH, CPU_CALL_GMACS = 8, 36  # on a CPU a call is of no more images and multiply-adds


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
    cuda: bool = False
    chosen_for_cpu: bool = False  # nobody asked for the quick set: there is no GPU
    small_rows: list[table5.Entry] = field(default_factory=list)  # QUICK_ROWS_CPU
    compile_once: bool = False  # only one row of Table 5 is compiled
    by_size: bool = False  # Table 5's batch depends on the network: on a CPU, unless one is given

    @classmethod
    def parse(cls, get) -> "Options":
        """Read the options and fill in the defaults.

        Args:
            get: `get(name)` is the value given for --name, or None.

        Raises:
            ValueError: A name is unknown or a number is too small.
        """
        cuda, quick = torch.cuda.is_available(), bool(get("quick"))
        if quick and get("all"):
            raise ValueError("--quick and --all: expected one of them")
        chosen_for_cpu = not (
            cuda or quick or any(get(name) for name in ("all", "rows", "modes", "protocols"))
        )
        quick = quick or chosen_for_cpu
        rows = _names(get("rows")) or (QUICK_ROWS if quick else None)
        default = QUICK_MODES if quick else list(MODES) if cuda else CPU_MODES
        modes = _names(get("modes")) or default
        default = ["batch", "paper"] if quick or cuda else ["batch"]
        protocols = _names(get("protocols")) or default
        known = [p for p in PROTOCOLS if p not in ("latency", "step")]  # they have their files
        cap = 64 if quick else 1 << 20
        numbers = {
            "batch": 256, "max-batch": cap if cuda else min(cap, 2 if quick else 8),
            "runs": 3 if quick else 30 if cuda else 10,
            "warmup": 1 if quick or not cuda else 10, "minutes": 1e6,
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
        small_rows = []
        if quick and not get("rows"):
            train_rows = table5.select(QUICK_ROWS[:1])
            small_rows = [] if cuda else table5.select(QUICK_ROWS_CPU)
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
            out=Path(get("out") or (RESULTS / "quick" if quick and not cuda else RESULTS)),
            again=bool(get("again")),
            profile=bool(get("profile")),
            quick=quick,
            cuda=cuda,
            chosen_for_cpu=chosen_for_cpu,
            small_rows=small_rows,
            compile_once=quick and not cuda and not get("modes"),
            by_size=not cuda and get("batch") is None and get("max-batch") is None,
        )

    def networks(self, train: bool = False) -> list[table5.Entry]:
        """The chosen rows of Table 5, each network and size once."""
        return table5.distinct(self.train_rows if train else self.rows)

    def table5_rows(self) -> list[tuple[str, table5.Entry, Mode]]:
        """What is measured of Table 5: protocol, network and mode.

        A network's modes come one after another, so that it is built once.
        """
        forward = [mode for mode in self.modes if not mode.train]
        pairs = [
            (protocol, entry, mode)
            for protocol in self.protocols
            for entry in self.networks()
            for mode in forward
            if self.compiles(entry, protocol, mode)
        ]
        small = [
            ("batch", entry, mode)
            for entry in table5.distinct(self.small_rows)
            for mode in forward
            if mode.name in CPU_MODES
        ]
        return [(p, e, m) for p, e, m in (*pairs, *small) if suits(e, m)]

    def compiles(self, entry: table5.Entry, protocol: str, mode: Mode) -> bool:
        """Whether a row is measured as far as compiling goes.

        Each compiled one takes half a minute: where nobody named modes, the quick set on a CPU has
        one.
        """
        if not (mode.compile and self.compile_once):
            return True
        return protocol == "batch" and entry.network == QUICK_ROWS[0]

    def batch_of(self, entry: table5.Entry, protocol: str) -> int:
        """Images a batch of a row of Table 5; of the protocol "paper" the largest that is tried.

        On a CPU a large network has a smaller batch: a call of it would last for seconds.
        """
        if protocol == "paper":
            return self.max_batch
        if not self.by_size:
            return min(self.batch, self.max_batch)
        batch = CPU_BATCH
        while batch > 1 and batch * entry.gmacs > CPU_CALL_GMACS:
            batch //= 2
        return batch

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


def suits(entry: table5.Entry, mode: Mode) -> bool:
    """Whether the mode is one for that kind of network."""
    return not ((mode.fast or mode.quantized_format) and entry.family == "convnet")


def _names(text):
    return [name.strip() for name in text.split(",") if name.strip()] if text else None
