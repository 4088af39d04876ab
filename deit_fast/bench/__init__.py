"""Measure models the way Table 5 of the DeiT paper was measured, and check them before.

modes.py      what is compared: eager, compiled and deit_fast, by precision
timing.py     clocks, input rotation, the chip's peak rates
networks.py   a network with its weights: agreement, largest batch, one measured row
results.py    the results file
profiling.py  where one forward pass spends its time
tables.py     all that for a terminal
"""
