"""A borrowed GPU in fifteen minutes: `python -m benchmarks.lease` measures what counts, in order.

    context.py     what a step gets: the device, the output folder, the time left
    runner.py      steps in child processes, each with a budget and a kill time
    plan.py        the steps, most valuable first
    orchestrate.py the run: facts, steps, what one of them tells the next
    ...            one module a step

Everything goes to one flat folder, row by row: `rows.jsonl` (each line has a "kind"), `lease.json`,
`tuned.json`, `clocks.csv`, `log.txt`.
"""
