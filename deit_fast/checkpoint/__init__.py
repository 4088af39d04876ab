"""Checkpoints: read safely, whatever trainer wrote them, fitted to another resolution, and plain
about what does not fit. `read.py` has the files, `allowed.py` what may be in them, `fit.py` the
models."""

from .fit import load_state, resize_pos_embed
from .read import read_checkpoint

__all__ = ["load_state", "read_checkpoint", "resize_pos_embed"]
