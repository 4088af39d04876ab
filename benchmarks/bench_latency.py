"""Milliseconds from a small batch on the device to its logits: batch 1, 8 and 32."""

from deit_fast.bench.measure import Plan


def test_latency(session, benchmark, entry, mode, latency_batch):
    plan = Plan("latency", latency_batch, session.options.runs, session.options.warmup)
    session.measure(benchmark, "latency", entry, mode, plan)
