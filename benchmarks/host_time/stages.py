"""An engine's call in its parts: images on the GPU, of its dtype, one of its batch sizes."""

from collections.abc import Callable

import torch
from torch import Tensor

from deit_fast import InferenceEngine
from deit_fast.bench.device import hardware
from deit_fast.bench.modes import Mode
from deit_fast.bench.network import Network
from deit_fast.bench.step import Step

from .rows import DTYPES, NETWORKS, one_thread, settings_of, summary
from .stand_ins import StandIns
from .turns import Contender, compare

CALL = "the whole call"
BETWEEN = "between them: the lock, calls of Python"


def stages(engine: InferenceEngine, images: Tensor) -> dict[str, Callable[[], object]]:
    """What a call runs, in this order; first the call itself.

    Args:
        engine: On a GPU, or on what stands in for one.
        images: As the engine's static input has them.

    Raises:
        RuntimeError: The engine does not take the short way for such images.
    """
    engine(images)  # the first one is looked at more closely
    graphs, ready = engine._graphs, engine._find_ready(images)
    if graphs is None or ready is None:
        raise RuntimeError(
            f"images: {images.dtype} on {images.device}, expected what the engine runs unchecked"
        )
    graphs.enter()
    stream = graphs._stream
    return {
        CALL: lambda: engine(images),
        "the argument, and which graph": lambda: engine._find_ready(images),
        "order after the last call": graphs.enter,
        "copy in": lambda: ready.copy_in(images),
        "replay": ready.replay,
        "copy out": ready.copy_out,
        "event for the next call": lambda: ready.record(stream),
        "check of the model": engine._check.require_unchanged,
    }


def stage_rows(label: str, settings: dict, stand_ins: StandIns) -> list[dict]:
    """The rows of one DeiT: network, stage, and microseconds as `summary` has them."""
    network = Network(NETWORKS[label], None, torch.device("cpu"))
    dtype = torch.float32 if settings["autocast"] else DTYPES[settings["dtype"]]
    step = Step(network, Mode("", dtype, fast=True, engine=True))
    images = step.cast(network.batch(1))
    with stand_ins.operators.idle(), stand_ins.no_graphs():
        step(images)
        assert step.engine is not None
        contenders = {name: Contender(call) for name, call in stages(step.engine, images).items()}
        times = compare(contenders, settings["rounds"], settings["block_us"], stand_ins.gpu)
    return rows_of(label, times)


def rows_of(label: str, times: dict[str, list[float]]) -> list[dict]:
    """Rows of a network, and one for what the stages leave of the call.

    Args:
        label: Ti, S or B.
        times: Stage -> microseconds of each round.
    """
    parts = [found for name, found in times.items() if name != CALL]
    rounds = zip(times[CALL], *parts, strict=True)
    times = {**times, BETWEEN: [whole - sum(others) for whole, *others in rounds]}
    return [{"network": label, "stage": name, "us": summary(us)} for name, us in times.items()]


def measure(networks=tuple(NETWORKS), dtype="bf16", autocast=False, rounds=15, quick=False) -> dict:
    """Everything that `--stages` prints.

    Raises:
        RuntimeError: A stand-in cannot be had.
    """
    with one_thread():
        stand_ins = StandIns.install()
        settings = settings_of(dtype, autocast, rounds, quick)
        rows = [found for name in networks for found in stage_rows(name, settings, stand_ins)]
        return {"hardware": hardware(torch.device("cpu")), "settings": settings, "rows": rows}
