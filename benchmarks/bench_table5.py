"""Table 5 of the DeiT paper: images/s of every network in every forward mode, by both protocols."""

from dataclasses import replace

from deit_fast.bench.measure import Plan
from deit_fast.bench.modes import REFERENCE

SECONDS_ON_A_CPU = 3.0  # of timed calls; five of them whatever they take


def test_throughput(session, benchmark, protocol, entry, mode):
    options = session.options
    plan = Plan(protocol, options.batch_of(entry, protocol), options.runs, options.warmup)
    if session.device.type == "cpu":  # where other work on the machine shows: in turn with eager
        in_turn = mode.fast and mode.eager == REFERENCE
        plan = replace(plan, timed_seconds=SECONDS_ON_A_CPU, in_turn=in_turn)
    session.measure(benchmark, "table5", entry, mode, plan)
