"""What a call costs the host: microseconds of Python and dispatcher, without a GPU.

    python -m benchmarks.host_time                      DeiT-Ti, S and B distilled, batch 1, bf16
    python -m benchmarks.host_time --dtype fp16
    python -m benchmarks.host_time --autocast           fp32 weights, products in --dtype
    python -m benchmarks.host_time --quick              DeiT-Ti, few rounds, few operations

For timm's eager model, ours, and ours in an `InferenceEngine`; and for each operation, PyTorch's
eager reference and ours. Tensors lie on the CPU and count as lying on an H100:

- Triton specialises and launches our kernels; the driver is a stand-in that does nothing.
- PyTorch's own operators, timm's and those between our kernels, pass through Python, dispatcher and
  autograd, check shapes and allocate, and compute nothing. They are no meta tensors: several shape
  functions of those are in Python, and take longer than a real call.
- Around an engine's graph torch.cuda's Python runs as it is. Streams, events, the graph and what
  torch.cuda calls in C are no-ops, and images count as lying on the GPU.

Left out on all sides, and so not in the ratio: the driver's part of a launch, some 2 to 4 us each
(the last column counts them), CUDA's allocator (malloc takes its place), the choice of cuBLAS's and
cuDNN's algorithms. Backward runs on the caller's thread, as it does on a CPU.

Processor time of this process, one thread; the calls take turns, in blocks, in an order that
changes every round. A ratio is the median of the rounds' ratios; the spread is from the 20th to the
80th percentile, as a share of the median.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks.operations import NO_BACKWARD, OPS, both_ways, cast, operations, tensors
from benchmarks.table5 import DISTILLED
from deit_fast.bench.device import hardware
from deit_fast.bench.modes import Mode
from deit_fast.bench.network import Network
from deit_fast.bench.step import Step
from deit_fast.kernels import _chips
from deit_fast.kernels.cases import deit_cases

TESTS = Path(__file__).parents[1] / "tests" / "helpers"
NETWORKS = {name: DISTILLED[name] for name in ("Ti", "S", "B")}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK_US = 20_000  # that a block of one call's repetitions should last
# Those of few rows share their tiles, those of many as well, and 16 divides no number of rows: of
# each kind all but the first find their kernels compiled
BATCHES = (2, 3, 4, 5, 6)
MANY = (*range(33, 40), *range(41, 48), *range(49, 56))
NEXT_CALLS = 5  # with which the first call of a batch size is compared


@dataclass(frozen=True)
class Contender:
    """What is timed: `call()`, within a context that is not."""

    call: Callable[[], object]
    within: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class StandIns:
    """A GPU, PyTorch's operators and CUDA graphs, none of them there."""

    gpu: object
    operators: object
    no_graphs: Callable[[], AbstractContextManager]

    @classmethod
    def install(cls) -> "StandIns":
        """For good, in this process. Raises RuntimeError where something is missing."""
        if _chips.INTERPRET:
            raise RuntimeError(
                "TRITON_INTERPRET is 1, expected it unset: kernels have to be launched"
            )
        if not (TESTS / "stand_in_cuda").is_dir():
            raise RuntimeError(f"no stand_in_cuda in {TESTS}, expected a checkout with its tests")
        if str(TESTS) not in sys.path:
            sys.path.append(str(TESTS))
        import stand_in_cuda
        from stand_in_cuda.graphs import no_graphs
        from stand_in_cuda.operators import Operators

        try:
            return cls(stand_in_cuda.install(), Operators(), no_graphs)
        except FileNotFoundError as error:
            raise RuntimeError(
                f"no compiler {error.filename!r}, expected one of C and C++"
            ) from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{error.cmd[0]} failed, expected compilers of C and C++") from error

    def launches(self, contender: Contender) -> tuple[int, int]:
        """Of one call: Triton's launches and PyTorch's own operators that would launch."""
        self.gpu.forget()
        before = self.operators.calls
        with contender.within():
            contender.call()
        if self.gpu.reasons():
            raise RuntimeError(f"refused: {self.gpu.reasons()[0]}")
        return len(self.gpu.launches()), self.operators.calls - before

    def working(self, contender: Contender) -> list[str]:
        """PyTorch's operators that would compute in a call."""
        with contender.within():
            return self.operators.working(contender.call)


def race(
    contenders: dict[str, Contender], rounds: int, block_us: float, gpu, clock=time.process_time_ns
) -> dict[str, list[float]]:
    """Microseconds a call, of each round. Raises RuntimeError where a kernel was compiled."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    repeats = {
        name: max(1, round(block_us / timed(contender, 1, clock)))
        for name, contender in contenders.items()
    }
    names, loads = list(contenders), gpu.loads()
    gc.collect()
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            timed(contenders[name], 1, clock)  # the others' memory and code have left the caches
            times[name].append(timed(contenders[name], repeats[name], clock))
        gpu.forget()
    if gpu.loads() != loads:
        raise RuntimeError(f"{gpu.loads() - loads} kernels were compiled while calls were timed")
    return times


def timed(contender: Contender, repeats: int, clock=time.process_time_ns) -> float:
    """Microseconds a call, without the garbage collector."""
    call = contender.call
    gc.disable()
    try:
        with contender.within():
            start = clock()
            for _ in range(repeats):
                call()
            return max(clock() - start, 1) / 1e3 / repeats
    finally:
        gc.enable()


def first_calls(step: Step, batches: Iterable[Tensor], gpu) -> list[float]:
    """Microseconds that the first call of a batch size takes more than the next ones, for each size
    of which no kernel was compiled. Raises RuntimeError where all needed one."""
    found = []
    for images in batches:
        loads, contender = gpu.loads(), Contender(lambda images=images: step(images))
        first, *more = (timed(contender, 1) for _ in range(1 + NEXT_CALLS))
        if gpu.loads() == loads:
            found.append(first - median(more))
    if not found:
        raise RuntimeError("every batch size had kernels of its own, expected one that had none")
    return found


def network_rows(label: str, settings: dict, stand_ins: StandIns) -> list[dict]:
    """Inference, forward and backward, an engine's call, the first call of another batch size."""
    network = Network(NETWORKS[label], None, torch.device("cpu"))
    dtype, gpu = DTYPES[settings["dtype"]], stand_ins.gpu
    weights = torch.float32 if settings["autocast"] else dtype
    autocast = dtype if settings["autocast"] else None

    def contender(within=nullcontext, **mode):
        step = Step(network, Mode("", weights, autocast=autocast, **mode))
        images = step.cast(network.batch(1))
        return Contender(lambda: step(images), within)

    contenders = {
        "timm": contender(), "ours": contender(fast=True),
        "engine": contender(stand_ins.no_graphs, fast=True, engine=True),
        "timm training": contender(train=True), "ours training": contender(train=True, fast=True),
    }  # fmt: skip
    step = Step(network, Mode("", weights, autocast=autocast, fast=True))
    sizes = BATCHES if settings["quick"] else (*BATCHES, *MANY)
    batches = [step.cast(network.images[:1].repeat(size, 1, 1, 1)) for size in sizes]
    with stand_ins.operators.idle():
        counts = {name: _prepared(name, c, stand_ins) for name, c in contenders.items()}
        times = race(contenders, settings["rounds"], settings["block_us"], gpu)
        extra = first_calls(step, batches, gpu)
    pairs = {
        "inference": ("timm", "ours"), "forward + backward": ("timm training", "ours training"),
        "an engine's call": ("timm", "engine"),
    }  # fmt: skip
    rows = [
        row(label, call, times[timm], times[ours], counts[timm], counts[ours])
        for call, (timm, ours) in pairs.items()
    ]
    call = "first call of another batch size, beyond the next"
    return [*rows, row(label, call, None, extra, None, None)]


def _prepared(name, contender, stand_ins):
    """Compiles and captures; the launches of a call."""
    stand_ins.launches(contender)
    working = stand_ins.working(contender)
    if working:
        raise RuntimeError(f"{name}: {', '.join(working)} would compute, expected no-ops of them")
    return stand_ins.launches(contender)


def operation_rows(op: str, settings: dict, stand_ins: StandIns) -> list[dict]:
    """Of DeiT-Ti's cases of an operation, forward and, where it trains, forward and backward."""
    cases = deit_cases(op, "Ti", 1)
    cases = dict(list(cases.items())[: 1 if settings["quick"] else None])
    return [
        found
        for operation in operations(op)
        for case, arguments in cases.items()
        for found in _case_rows(op, operation, case, arguments, settings, stand_ins)
    ]


def _case_rows(op, operation, case, arguments, settings, stand_ins):
    dtype = DTYPES[settings["dtype"]]

    @contextmanager
    def forward():
        amp = torch.autocast("cpu", dtype) if settings["autocast"] else nullcontext()
        with torch.no_grad(), amp:
            yield

    inputs = operation.inputs(**arguments, device="cpu")
    inputs = inputs if settings["autocast"] else cast(inputs, dtype)
    with stand_ins.operators.idle(), forward():
        results = tensors([operation.call(**inputs)])
    upstream = {f"upstream_{i}": torch.randn(y.shape).to(y.dtype) for i, y in enumerate(results)}
    ways = {"forward": ((operation.reference, operation.call), inputs)}
    if op not in NO_BACKWARD:
        both = both_ways(operation.reference), both_ways(operation.call)
        ways["forward + backward"] = (both, inputs | upstream)
    for way, (calls, given) in ways.items():
        timm, ours = (
            Contender(lambda call=call, given=given: call(**given), forward) for call in calls
        )
        contenders = {"ours": ours}
        with stand_ins.operators.idle():
            counts = {"timm": None, "ours": _prepared(operation.name, ours, stand_ins)}
            if _is_idle(timm, stand_ins):
                contenders["timm"] = timm
                counts["timm"] = stand_ins.launches(timm)
            times = race(contenders, settings["rounds"], settings["block_us"] / 4, stand_ins.gpu)
        call = " ".join(filter(None, (operation.name, case)))
        yield row("Ti", f"{call}, {way}", times.get("timm"), times["ours"], *counts.values())


def _is_idle(contender, stand_ins):
    """Whether nothing of PyTorch's would compute."""
    try:
        return not stand_ins.working(contender)
    except (IndexError, RuntimeError):  # it indexes with numbers that nobody computed
        return False


def row(network, call, timm, ours, timm_launches, launches) -> dict:
    """timm, ours: microseconds of each round; None where there are none."""
    ratio = None if timm is None else median(b / a for a, b in zip(timm, ours, strict=True))
    return {
        "network": network, "call": call, "timm_us": timm and summary(timm),
        "ours_us": summary(ours), "ratio": ratio,
        "timm_launches": timm_launches and sum(timm_launches),
        "ours_launches": launches and dict(zip(("triton", "pytorch"), launches, strict=True)),
    }  # fmt: skip


def summary(times: list[float]) -> dict[str, float]:
    """Median, least, and the distance of the 20th from the 80th percentile over the median."""
    fifths = quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    middle = median(times)
    return {"median": middle, "least": min(times), "spread": (fifths[3] - fifths[0]) / middle}


def measure(
    networks=tuple(NETWORKS), dtype="bf16", autocast=False, rounds=15, ops=OPS, quick=False
) -> dict:
    """Everything that the command prints. Raises RuntimeError where a stand-in cannot be had."""
    settings = {
        "batch": 1, "dtype": dtype, "autocast": autocast, "rounds": rounds,
        "quick": quick, "block_us": BLOCK_US / 4 if quick else BLOCK_US,
    }  # fmt: skip
    stand_ins = StandIns.install()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "CUDA initialization")  # PyTorch finds the stand-in
    try:
        rows = [found for name in networks for found in network_rows(name, settings, stand_ins)]
        rows += [found for op in ops for found in operation_rows(op, settings, stand_ins)]
        return {"hardware": hardware(torch.device("cpu")), "settings": settings, "rows": rows}
    finally:
        torch.set_num_threads(threads)


def markdown(data: dict) -> str:
    """The table, and what it was measured with."""
    head = ["", "timm, us", "least", "spread", "ours, us", "least", "spread", "ours / timm",
            "launches left out"]  # fmt: skip
    lines = [head, ["---"] + ["---:"] * 8]
    for one in data["rows"]:
        ours = one["ours_launches"]
        counts = "" if ours is None else f"{one['timm_launches'] or '-'}; {_sum(ours)}"
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}"
        name = f"DeiT-{one['network']}: {one['call']}"
        lines.append([name, *_times(one["timm_us"]), *_times(one["ours_us"]), ratio, counts])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join(
        "| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                          enumerate(zip(line, widths, strict=True))) + " |"
        for line in lines
    )  # fmt: skip
    on, settings = data["hardware"], data["settings"]
    kind = f"autocast to {settings['dtype']}" if settings["autocast"] else settings["dtype"]
    return (
        f"{on['cpu']}, one thread; Python {on['python']}, PyTorch {on['torch']}, Triton "
        f"{on['triton']}, timm {on['timm']}; batch 1, {kind}, {settings['rounds']} rounds. No GPU "
        f"was there; launches are no-ops.\n\n{table}"
    )


def _times(us):
    if us is None:
        return ["-"] * 3
    if us["least"] < 0:  # a difference
        return [f"{us['median']:,.0f}", "-", "-"]
    return [f"{us['median']:,.0f}", f"{us['least']:,.0f}", f"{us['spread']:.0%}"]


def _sum(launches):
    return f"{launches['triton']} + {launches['pytorch']}"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m benchmarks.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=None)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--autocast", action="store_true", help="fp32 weights, products in --dtype")
    parser.add_argument("--rounds", type=int, default=None, help="default: 15; --quick: 3")
    parser.add_argument("--operations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="DeiT-Ti, few operations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as data")
    args = parser.parse_args(argv)
    rounds = args.rounds if args.rounds is not None else 3 if args.quick else 15
    if rounds < 1:
        parser.error(f"--rounds: {rounds}, expected 1 or more")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: {args.json.parent} is no folder")
    networks = args.networks or list(NETWORKS)[: 1 if args.quick else None]
    ops = OPS[: 3 if args.quick else None] if args.operations else ()
    try:
        data = measure(networks, args.dtype, args.autocast, rounds, ops, args.quick)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    print(markdown(data))
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
