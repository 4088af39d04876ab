"""`python -m benchmarks.predict`: what a forward pass should take on an H100 or H200.

chips.py     the GPUs, and their peak rates
costs.py     FLOPs, bytes and predicted time of one launch
model.py     the launches of a whole DeiT
table.py     the table of docs/performance.md
__main__.py  the command, with what was measured beside it
"""
