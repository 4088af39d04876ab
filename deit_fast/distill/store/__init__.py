"""Soft-label stores: a teacher's probabilities, written once, from which students learn without it.

This is TinyViT's fast pretraining distillation (section 3 of that paper).

    write(...)       the teacher's K largest probabilities for every view of some epochs
    Store(folder)    what is there, whole or damaged
    check(...)       the teacher again, on a sample

Training from a store is `deit_fast.distill.train.train` with `Settings(store=folder)`.
"""

from .check import check
from .format import Damaged
from .reader import Store
from .write import write

__all__ = ["Damaged", "Store", "check", "write"]
