"""What the chip itself can do: its copy bandwidth and its best large matrix products."""

from benchmarks.suite import REPLAY


def test_ceilings(session, benchmark):
    found = session.ceilings(again=session.options.again)
    benchmark.extra_info |= found
    REPLAY.play(benchmark, [1 / found["copy_tb_per_s"]])  # a gigabyte copied
