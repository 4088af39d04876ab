"""ViT, DeiT-III, CaiT and TinyViT: images/s in every forward mode, at a given batch."""

from deit_fast.bench.measure import Plan


def test_throughput(session, benchmark, entry, mode):
    options = session.options
    plan = Plan("batch", min(options.batch, options.max_batch), options.runs, options.warmup)
    session.measure(benchmark, "relatives", entry, mode, plan)
