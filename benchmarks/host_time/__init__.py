"""`python -m benchmarks.host_time`: what a call costs the host, without a GPU.

turns.py      the clock: calls that take turns
stand_ins.py  a GPU and PyTorch operators that do nothing
rows.py       what is timed
stages.py     an engine's call in its parts
table.py      the results in Markdown
__main__.py   the command, and what its figures mean
"""
