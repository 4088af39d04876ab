"""All tasks of a model: what one forward pass of it asks of the table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from deit_fast.bench.launches import record
from deit_fast.kernels._chips import Chip

from .operations import attention, layer_norm_linear, layer_norm_mlp, linear, quantized_linear
from .task import Task

# Operations that others consist of come first: their best choices serve those that follow
ORDER = ("linear", "attention", "layer_norm_linear", "layer_norm_mlp", "quantized_linear")
_TASKS: dict[str, Callable[[Sequence[Any], Chip], Iterator[Task]]] = {
    "linear": linear.tasks, "layer_norm_linear": layer_norm_linear.tasks,
    "layer_norm_linear_prologue": layer_norm_linear.tasks, "attention": attention.tasks,
    "attention_quantized": attention.quantized_tasks,
    "quantized_linear": quantized_linear.tasks,
}  # fmt: skip


def tasks(
    model: torch.nn.Module, batch: int, dtype: torch.dtype, chip: Chip, training: bool = False
) -> list[Task]:
    """The tasks of a model, each once, as `ordered`.

    Args:
        model: Accelerated; moved to the meta device, cast to `dtype` and put in eval mode.
        batch: Images.
        dtype: Of weights and images.
        chip: That is tuned.
        training: Also the one GEMM of the backward pass that may be Triton's.
    """
    recorder = record(model, batch, dtype, chip, tables=False)
    found: dict[Task, None] = {}
    # the last first: of the calls of one shape only the model's first lacks its row statistics
    for name, args, _ in reversed(recorder.calls):
        if name in _TASKS:
            for task in _TASKS[name](args, chip):
                found.setdefault(task)
    found |= dict.fromkeys(layer_norm_mlp.tasks(recorder.calls, chip))
    if training:
        found |= dict.fromkeys(linear.gelu_backward_tasks(recorder.calls, chip))
    return ordered(found)


def ordered(wanted: Iterable[Task]) -> list[Task]:
    """Tasks in the order of ORDER."""
    return sorted(wanted, key=lambda task: ORDER.index(task.op))
