"""Predictions in files: saved as they are made, resumed after any interruption.

`job.py` is one result file in the making, `formats.py` what it is written as, `entries.py` the
predictions as plain dicts.
"""

from .entries import entries
from .formats import arrow_table, check_output
from .job import Job, WriteError

__all__ = ["Job", "WriteError", "arrow_table", "check_output", "entries"]
