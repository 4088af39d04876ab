"""Fast pretraining distillation (TinyViT paper, section 3): a teacher's answers, stored once, from
which any number of students learn without it.

    write(...)       the teacher's K largest probabilities for every picture of some epochs
    Store(folder)    what is there, whole or damaged
    check(...)       the teacher again, on a sample

Training from a store is `deit_fast.distill.train.train` with `Settings(store=folder)`.
"""

from .check import check
from .files import Damaged, Store
from .write import write

__all__ = ["Damaged", "Store", "check", "write"]
