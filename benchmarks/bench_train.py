"""Training at batch 64 and 256: forward + backward, and the full step with AdamW."""

from deit_fast.bench.measure import Plan


def test_train(session, benchmark, entry, mode, train_protocol, train_batch):
    plan = Plan(train_protocol, train_batch, session.options.runs, session.options.warmup)
    session.measure(benchmark, "train", entry, mode, plan)
