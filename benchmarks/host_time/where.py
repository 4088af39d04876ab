"""Where the host time of an operation goes, in Python and as a launch plan."""

import cProfile
import pstats
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.operations import OPS, cast, operations
from deit_fast.bench.device import hardware
from deit_fast.kernels.cases import deit_cases
from deit_fast.layers import _plans

from .rows import DTYPES, one_thread, settings_of, summary
from .stand_ins import StandIns
from .turns import Contender, compare

PROFILED = 200  # calls
ALLOCATION, LAUNCHER = "allocation", "Triton's launcher"
DESCRIPTORS, TORCH, OURS = "descriptors", "PyTorch's Python and dispatcher", "checks and choices"
PARTS = (OURS, LAUNCHER, DESCRIPTORS, ALLOCATION, TORCH)


def part_of(file: str, function: str) -> str:
    """The part of the host time that a function's own time belongs to.

    Args:
        file: Its source, as pstats has it; "~" for a function in C.
        function: Its name.
    """
    if "tensor_descriptor" in file or "tensordesc" in function or "fill_tma" in function:
        return DESCRIPTORS
    if any(name in function for name in ("new_empty", "empty_like", "empty_strided")):
        return ALLOCATION
    if "/triton/" in file or "triton" in function or "cuda_utils" in function:
        return LAUNCHER
    if "/kernels/" in file or "/deit_fast/" in file:
        return OURS
    return TORCH


def shares(call: Callable[[], object]) -> dict[str, float]:
    """How a call's own times divide among `PARTS`, under cProfile, whose cost is in them."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(PROFILED):
        call()
    profile.disable()
    found = dict.fromkeys(PARTS, 0.0)
    for (file, _, function), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        found[part_of(file, function)] += own
    whole = sum(found.values())
    return {part: own / whole for part, own in found.items()}


class _Planned(nn.Module):
    """An operation as a method, whose calls become plans."""

    def __init__(self, call: Callable, inputs: dict) -> None:
        super().__init__()
        self.call = call
        self.leaves, self.spec = tree_flatten(inputs)
        self.tensors = [_apart(x) for x in self.leaves if isinstance(x, torch.Tensor)]

    @_plans.planned()
    def forward(self, *tensors):
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        return self.call(**tree_unflatten(leaves, self.spec))


def _apart(x):
    """The tensor in memory of its own: a plan's arguments share none."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def operation_rows(op: str, settings: dict, stand_ins: StandIns) -> Iterator[dict]:
    """The rows of one operation on DeiT-Ti's shapes, forward.

    call, launches; `python_us` and `plan_us` as `summary` has them; the shares of `PARTS` in the
    first; `why_not`: why there is no plan.
    """
    dtype = DTYPES[settings["dtype"]]
    for operation in operations(op):
        for case, arguments in deit_cases(op, "Ti", 1).items():
            inputs = cast(operation.inputs(**arguments, device="cpu"), dtype)
            planned = _Planned(operation.call, inputs)

            def call(planned=planned):
                return planned(*planned.tensors)

            contenders = {
                "python": Contender(call, _in_python), "plan": Contender(call, torch.no_grad),
            }  # fmt: skip
            with stand_ins.operators.idle():
                for contender in contenders.values():
                    for _ in range(3):
                        stand_ins.launches(contender)
                launches = sum(stand_ins.launches(contenders["plan"]))
                block_us = settings["block_us"] / 4
                times = compare(contenders, settings["rounds"], block_us, stand_ins.gpu)
                with _in_python():
                    parts = shares(call)
            yield {
                "call": " ".join(filter(None, (operation.name, case))), "launches": launches,
                "python_us": summary(times["python"]), "plan_us": summary(times["plan"]),
                "shares": parts, "why_not": _plans.why_not(planned).get("forward"),
            }  # fmt: skip


class _in_python(torch.no_grad):
    """No gradients, and no plans."""

    def __enter__(self):
        super().__enter__()
        self.context = _plans.in_python()
        self.context.__enter__()

    def __exit__(self, *error):
        self.context.__exit__(*error)
        super().__exit__(*error)


def measure(dtype="bf16", rounds=15, ops=OPS, quick=False) -> dict:
    """Everything that `--where` prints.

    Raises:
        RuntimeError: A stand-in cannot be had.
    """
    with one_thread():
        stand_ins = StandIns.install()
        settings = settings_of(dtype, False, rounds, quick)
        rows = [found for op in ops for found in operation_rows(op, settings, stand_ins)]
        return {"hardware": hardware(torch.device("cpu")), "settings": settings, "rows": rows}
