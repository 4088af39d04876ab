"""What is timed: timm's model, ours and ours in an engine; operations and their references."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from statistics import median, quantiles

import torch

from benchmarks.operations import NO_BACKWARD, OPS, both_ways, cast, operations, tensors
from benchmarks.table5 import DISTILLED
from deit_fast.bench.device import hardware
from deit_fast.bench.modes import Mode
from deit_fast.bench.network import Network
from deit_fast.bench.step import Step
from deit_fast.kernels import _plan_library
from deit_fast.kernels.cases import deit_cases

from .stand_ins import StandIns
from .turns import Contender, compare, first_calls

NETWORKS = {name: DISTILLED[name] for name in ("Ti", "S", "B")}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK_US = 20_000  # that a block of one call's repetitions should last
# Those of few rows share their tiles, those of many as well, and 16 divides no number of rows: of
# each kind all but the first find their kernels compiled
BATCHES = (2, 3, 4, 5, 6)
MANY = (*range(33, 40), *range(41, 48), *range(49, 56))


def network_rows(label: str, settings: dict, stand_ins: StandIns) -> list[dict]:
    """The rows of one DeiT.

    Inference, forward and backward, an engine's call, the first two calls of another batch size.
    """
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
        times = compare(contenders, settings["rounds"], settings["block_us"], gpu)
        first, second = first_calls(step, batches, gpu)
    pairs = {
        "inference": ("timm", "ours"), "forward + backward": ("timm training", "ours training"),
        "an engine's call": ("timm", "engine"),
    }  # fmt: skip
    rows = [
        row(label, call, times[timm], times[ours], counts[timm], counts[ours])
        for call, (timm, ours) in pairs.items()
    ]
    for which, extra in (("first", first), ("second", second)):
        call = f"{which} call of another batch size, beyond one in Python"
        rows.append(row(label, call, None, extra, None, None))
    return rows


def _prepared(name, contender, stand_ins):
    """Compiles and captures; the launches of a call."""
    stand_ins.launches(contender)
    working = stand_ins.working(contender)
    if working:
        raise RuntimeError(f"{name}: {', '.join(working)} would compute, expected no-ops of them")
    return stand_ins.launches(contender)


def operation_rows(op: str, settings: dict, stand_ins: StandIns) -> list[dict]:
    """The rows of one operation on DeiT-Ti's shapes.

    Forward and, where it trains, forward and backward.
    """
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
            times = compare(contenders, settings["rounds"], settings["block_us"] / 4, stand_ins.gpu)
        call = " ".join(filter(None, (operation.name, case)))
        yield row("Ti", f"{call}, {way}", times.get("timm"), times["ours"], *counts.values())


def _is_idle(contender, stand_ins):
    """Whether nothing of PyTorch's would compute."""
    try:
        return not stand_ins.working(contender)
    except (IndexError, RuntimeError):  # it indexes with numbers that nobody computed
        return False


def row(network, call, timm, ours, timm_launches, launches) -> dict:
    """One row of the results.

    Args:
        network: Ti, S or B.
        call: What is called.
        timm: Microseconds of each round of timm's; None where there are none.
        ours: Microseconds of each round of ours.
        timm_launches: Launches of a call, Triton's and PyTorch's.
        launches: The same of ours.
    """
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
    """Everything that the command prints.

    Raises:
        RuntimeError: A stand-in cannot be had.
    """
    with one_thread():
        stand_ins = StandIns.install()
        settings = settings_of(dtype, autocast, rounds, quick)
        rows = [found for name in networks for found in network_rows(name, settings, stand_ins)]
        rows += [found for op in ops for found in operation_rows(op, settings, stand_ins)]
        return {"hardware": hardware(torch.device("cpu")), "settings": settings, "rows": rows}


def settings_of(dtype: str, autocast: bool, rounds: int, quick: bool) -> dict:
    """What the results were measured with."""
    return {
        "batch": 1, "dtype": dtype, "autocast": autocast, "rounds": rounds,
        "quick": quick, "block_us": BLOCK_US / 4 if quick else BLOCK_US,
        "plans": _plan_library.status(),
    }  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, which warns of no GPU: it finds the stand-in."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "CUDA initialization")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
