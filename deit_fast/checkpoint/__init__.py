"""Checkpoints of many trainers: read without running code, and fitted to a model.

`read.py` finds the state dict in a file, `allowed.py` lists the objects that may be in it, `fit.py`
loads it into a model of another resolution or with other heads.
"""

from .fit import load_state, resize_pos_embed
from .read import read_checkpoint

__all__ = ["load_state", "read_checkpoint", "resize_pos_embed"]
