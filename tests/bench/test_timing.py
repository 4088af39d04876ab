"""Clocks warm up, count and rotate their inputs."""

import time

import pytest
import torch
from checking import FP64

from deit_fast.bench import peak_rates, timing

CPU = torch.device("cpu")


def test_summary_is_the_percentiles():
    times = [5.0, 1.0, 2.0, 4.0, 3.0, 100.0]
    found = timing.summary(times)
    expected = torch.quantile(
        torch.tensor(times, dtype=FP64), torch.tensor([0.2, 0.5, 0.8], dtype=FP64)
    )
    assert [found[k] for k in ("ms_p20", "ms_median", "ms_p80")] == pytest.approx(expected.tolist())
    assert found["ms_mean"] == pytest.approx(sum(times) / 6)
    assert set(timing.summary([7.0]).values()) == {7.0}


@pytest.mark.parametrize("clock", [timing.throughput_ms, timing.latency_ms, timing.kernel_ms])
def test_clocks_warm_up_rotate_and_count(clock):
    seen = []

    def call(x):
        seen.append(x)
        time.sleep(0.02 if x == "slow" else 0.002)

    times = clock(call, ["slow", "fast"], runs=4, warmup=3, device=CPU)
    assert seen == ["slow", "fast", "slow", "fast", "slow", "fast", "slow"]
    assert len(times) == 4
    assert min(times[1], times[3]) >= 20 > max(times[0], times[2]) >= 2


def test_calls_in_turn_never_share_an_input():
    seen = []

    def call(name, seconds):
        def run(x):
            seen.append((name, x))
            time.sleep(seconds)

        return run

    calls = call("slow", 0.02), call("fast", 0.002)
    slow, fast = timing.in_turn_ms(calls, [1, 2, 3], runs=2, warmup=1, device=CPU)
    assert seen == [("slow", 1), ("fast", 2), ("slow", 3), ("fast", 1), ("slow", 2), ("fast", 3)]
    assert len(slow) == len(fast) == 2 and min(slow) >= 20 and min(fast) >= 2


@pytest.mark.gpu("the clocks of a device")
@pytest.mark.parametrize("clock", [timing.throughput_ms, timing.latency_ms, timing.kernel_ms])
def test_device_clocks_agree_on_a_large_copy(clock):
    device = torch.device("cuda")
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    (low, high) = (0.5, 2.0)
    expected = 2e3 * source.nbytes / 1e12 / peak_rates.peak_rates(device, runs=5)["copy_tb_per_s"]
    times = clock(lambda x: target.copy_(x), [source], runs=5, warmup=2, device=device)
    assert low < sorted(times)[2] / expected < high


def test_rotation_leaves_no_input_in_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 100)
    for nbytes, sets in ((1, 64), (30, 14), (100, 4), (399, 2), (400, 1), (5000, 1)):
        made = timing.rotation(object, nbytes, CPU)
        assert len(made) == len(set(map(id, made))) == sets, nbytes


def test_a_graph_of_short_kernels_lasts_a_millisecond():
    assert [timing.copies(ms) for ms in (0.001, 0.02, 0.4, 0.7, 5.0)] == [64, 50, 2, 1, 1]


def test_runs_of_a_latency_row():
    assert [timing.latency_runs(ms) for ms in (0.3, 5.0, 10.0, 100.0)] == [200, 100, 50, 30]
    assert timing.latency_runs(100.0, 3) == 5 and timing.latency_runs(900.0, 3) == 3


def test_host_time_is_that_of_the_call():
    def call(x):
        time.sleep(x)

    found = timing.host_ms(call, [0.001, 0.02, 0.02], 3, CPU)
    assert 20 <= found < 30
