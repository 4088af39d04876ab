"""Benchmark on this GPU which implementation and tiles serve each operation of a model best.

`python -m deit_fast.tune` writes the winners to the table that every process on this GPU reads.

task.py         one operation on one shape, and what may serve it
operations/     the tasks of each operation, from one recorded call of it
model_tasks.py  all tasks of a model
benchmark.py    the candidates of a task: checked against PyTorch, then timed
table.py        the table of winners
dispatch.py     what "auto" takes
command.py      what the command does; options.py, its options; entry.py, python -m
"""

from typing import TYPE_CHECKING

from deit_fast import _lazy

if TYPE_CHECKING:  # where each name comes from: the same as in _lazy.attach below
    from .benchmark import allowance, autotune
    from .dispatch import served_by
    from .entry import main
    from .model_tasks import tasks
    from .table import TableRow, read_rows, write
    from .task import Task

__all__ = [
    "TableRow", "Task", "allowance", "autotune", "main", "read_rows", "served_by", "tasks", "write",
]  # fmt: skip

_lazy.attach(
    __name__,
    {
        "benchmark": ("allowance", "autotune"),
        "dispatch": ("served_by",),
        "entry": ("main",),
        "model_tasks": ("tasks",),
        "table": ("TableRow", "read_rows", "write"),
        "task": ("Task",),
    },
)
