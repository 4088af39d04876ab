"""The chip's peak rates: its copy bandwidth and its best large GEMMs."""

from benchmarks.suite import REPLAY


def test_peak_rates(session, benchmark):
    found = session.peak_rates(again=session.options.again)
    benchmark.extra_info |= found
    REPLAY.play(benchmark, [1 / found["copy_tb_per_s"]])  # a gigabyte copied
