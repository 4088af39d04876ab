"""`python -m benchmarks.report`: what the results files say, for readers.

measured.py    one chip's results, looked up
targets.py     the speeds that are aimed at, and whether they are reached
readme.py      the README's tables
comparison.py  Table 5 here beside the paper's, for a terminal and the manual
page.py        a page for each chip, from page.html
plots.py       its plots
__main__.py    the command
"""
