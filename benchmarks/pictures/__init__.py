"""`python -m benchmarks.pictures`: the SVGs of docs/pictures, readable on light and on dark.

style.py       colours of both schemes, the frame of a picture, from a figure to SVG
labels.py      labels beside points, where they cover nothing; texts that overlap
throughput.py  throughput against accuracy, the paper's Figure 1
latency.py     latency against batch size
roofline.py    operations of the forward pass under the roofline
studies.py     the training studies of docs/studies
attention.py   attention maps of the shipped model on shipped images
screenshots.py of the HTML report, by Chromium
example.py     made-up results for them, where nothing was measured
__main__.py    the command
"""
