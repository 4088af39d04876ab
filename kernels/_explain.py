"""Why an operation went where it did: `explain(model, images)` lists every decision of one call."""

from collections.abc import Callable
from typing import NamedTuple

import torch

ASKED = "asked for by the caller"


class Decision(NamedTuple):
    """What served one call of an operation, and why."""

    op: str
    implementation: str
    reason: str


decisions: list[Decision] | None = None  # a list only while `explain` runs


def record(op: str, implementation: str, reason: str) -> None:
    """Add a decision to the list of `explain`, where one runs; nothing while torch.compile traces.

    Callers test `decisions is not None` themselves: that is all that a normal call pays.
    """
    if torch.compiler.is_compiling() or decisions is None:
        return
    decisions.append(Decision(op, implementation, reason))


def record_table(op: str, implementation: str, reason: str) -> None:
    """`record` what a tuned table says, unless the caller asked for another implementation."""
    if torch.compiler.is_compiling() or decisions is None:
        return
    before = next((d for d in reversed(decisions) if d.op == op), None)
    if before is None or before.reason != ASKED or before.implementation == implementation:
        record(op, implementation, reason)


def explain(function: Callable[..., object], /, *args: object, **kwargs: object) -> list[Decision]:
    """Which implementation served each operation of one call, and why.

    `function(*args, **kwargs)` runs once. What torch.compile made of it runs eagerly, because the
    decisions of compiled code were made when it was compiled. Not for use from several threads.

    Args:
        function: An operation of `deit_fast.kernels`, a module, a whole model, or any function that
            calls them.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        A decision per entry, in the order in which they were made. A tuned table decides after the
        rule: its entry follows the rule's, and holds. So does that of an operation that leaves its
        kernel after all, because an argument requires a gradient. An operation made of others, such
        as `layer_norm_linear`, is followed by its parts.

    Raises:
        Exception: Whatever the call raises.
    """
    global decisions
    before, decisions = decisions, []
    try:
        with torch.compiler.set_stance("force_eager"):
            function(*args, **kwargs)
        return decisions
    finally:
        decisions = before
