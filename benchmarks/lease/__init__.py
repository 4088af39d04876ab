"""`python -m benchmarks.lease`: the most valuable measurements of a GPU lent for fifteen minutes.

The run
    __main__.py     the command
    plan.py         the steps, most valuable first
    orchestrate.py  the run: facts, steps, what one of them tells the next
    runner.py       steps in child processes, each with a budget and a kill time
    background.py   compilation beside the steps
    warmup.py       what is compiled ahead: the kernels that the steps launch
    compile_only.py launches that compile and do nothing else
    clocks.py       nvidia-smi's samples
    bare.py         a checkout without an installation
    context.py      what a step gets: the device, the output folder, the time left

The steps, a module each: facts, smoke, agreement, peak_rates, tuning, models (throughput,
quantized, training, latency, relatives), compiled, sanitize, kernels

What came back, for `python -m benchmarks.take`
    check.py        a folder read back, implausible figures rejected
    figures.py      measurements beside predictions

Everything goes to one flat folder, row by row: `rows.jsonl` (each line has a "kind"), `lease.json`,
`tuned.json`, `clocks.csv`, `log.txt`.
"""
