"""Measure models the way Table 5 of the DeiT paper was measured, after checking their outputs.

modes.py        what is compared: eager, compiled and deit_fast, by precision
device.py       what the chip is and can compute
timing.py       clocks and the rotation of inputs
peak_rates.py   the chip's measured peak rates
weights.py      random weights and images
network.py      a network with its weights, and which modes it has
step.py         one call of a network in one mode: a forward pass or a training step
correctness.py  a step's outputs against eager fp32
measure.py      one measured row; the largest batch that fits
failures.py     errors as notes of a row, and those that lose the device
results.py      the results file
launches.py     what a model launches, without a GPU
profiling.py    where one forward pass spends its time
tables.py       rows and profiles for a terminal
"""
