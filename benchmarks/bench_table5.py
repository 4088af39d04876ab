"""Table 5 of the DeiT paper: images/s of every network in every forward mode, by both protocols."""

from deit_fast.bench.measure import Plan


def test_throughput(session, benchmark, protocol, entry, mode):
    options = session.options
    batch = options.max_batch if protocol == "paper" else min(options.batch, options.max_batch)
    plan = Plan(protocol, batch, options.runs, options.warmup)
    session.measure(benchmark, "table5", entry, mode, plan)
