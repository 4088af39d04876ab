"""Clocks count what they say, inputs rotate, and the chip's peak rates are figures."""

import time

import pytest
import torch
from checking import FP64

from deit_fast.bench import timing

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


@pytest.mark.gpu("the clocks of a device")
@pytest.mark.parametrize("clock", [timing.throughput_ms, timing.latency_ms, timing.kernel_ms])
def test_device_clocks_agree_on_a_large_copy(clock):
    device = torch.device("cuda")
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    (low, high) = (0.5, 2.0)
    expected = 2e3 * source.nbytes / 1e12 / timing.peak_rates(device, runs=5)["copy_tb_per_s"]
    times = clock(lambda x: target.copy_(x), [source], runs=5, warmup=2, device=device)
    assert low < sorted(times)[2] / expected < high


def test_rotation_leaves_no_input_in_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 100)
    for nbytes, sets in ((1, 64), (30, 14), (100, 4), (399, 2), (400, 1), (5000, 1)):
        made = timing.rotation(object, nbytes, CPU)
        assert len(made) == len(set(map(id, made))) == sets, nbytes


def test_folder_names(monkeypatch):
    names = {
        "NVIDIA H200": "h200",
        "Tesla V100-SXM2-16GB": "tesla-v100-sxm2-16gb",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q": "rtx-pro-6000-blackwell-max-q",
    }
    for name, folder in names.items():
        monkeypatch.setattr(timing, "device_name", lambda device, name=name: name)
        assert timing.slug(torch.device("cuda")) == folder
    assert timing.slug(CPU) == "cpu"


@pytest.mark.slow
def test_peak_rates_are_plausible(device):
    found = timing.peak_rates(torch.device(device), runs=3)
    assert {"copy_tb_per_s", "fp32_tflops", "fp16_tflops", "bf16_tflops"} <= set(found)
    assert all(1e-5 < value < 1e5 for value in found.values())
    a = torch.randn(1024, 1024)  # the same product by hand: within what noise there is
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(10):
            a @ a
        by_hand = 10 * 2 * 1024**3 / (time.perf_counter() - start) / 1e12
        assert 0.2 < found["fp32_tflops"] / by_hand < 5


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_peak_rates_of_eight_bits(format):
    """The products themselves, where the chip has them."""
    assert 1e-9 < timing._eight_bits_tflops((32, 48, 64), format, 2, CPU) < 1e3
    assert timing.formats(CPU) == ["fp8", "int8"]
    least = {"fp8": (8, 9), "int8": (8, 0)}[format]
    assert timing.why_no_products(format, least) is None
    assert "compute capability" in timing.why_no_products(format, (7, 5))
    assert "needs compute capability 8.9" in timing.why_no_products("fp8", (8, 6))


def test_a_peak_rate_that_does_not_run_is_left_out(monkeypatch):
    """With a warning, and the others stand; a device that is lost is not passed over."""

    class Cuda:  # as far as peak rates looks
        type = "cuda"

    def eight_bits(shape, format, runs, device):
        if format == "fp8":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nat ...")
        return 7.0

    for name, value in {"_copy_tb_per_s": 4.0, "_product_tflops": 5.0}.items():
        monkeypatch.setattr(timing, name, lambda *args, value=value: value)
    monkeypatch.setattr(timing, "formats", lambda device: ["fp8", "int8"])
    monkeypatch.setattr(timing, "_eight_bits_tflops", eight_bits)
    monkeypatch.setattr(timing, "release", lambda device: None)
    with pytest.warns(UserWarning, match="no peak rate of fp8: CUBLAS_STATUS_NOT_SUPPORTED$"):
        found = timing.peak_rates(Cuda())
    assert "fp8_tflops" not in found
    assert (found["int8_tflops"], found["bf16_tflops"], found["copy_tb_per_s"]) == (7.0, 5.0, 4.0)

    def lost(*args):
        raise torch.AcceleratorError("CUDA error: an illegal memory access")

    monkeypatch.setattr(timing, "_eight_bits_tflops", lost)
    with pytest.raises(torch.AcceleratorError):
        timing.peak_rates(Cuda())


def test_hardware_says_what_this_is():
    found = timing.hardware(CPU)
    assert found["gpu"] is None and found["cpu"] and found["threads"] >= 1
    assert found["torch"].startswith(torch.__version__.partition("+")[0])


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


def test_the_last_sample_of_the_clocks(tmp_path):
    path = tmp_path / "clocks.csv"
    unknown = {"sm_mhz": None, "mem_mhz": None, "power_w": None, "temperature_c": None}
    assert timing.last_sample(path) == unknown
    path.write_text("2026/11/26 10:00:00.000, 1980, 26")
    assert timing.last_sample(path) == unknown  # no whole line yet
    path.write_text(
        "2026/11/26 10:00:00.000, 345, 2619, 80.1, 31\n"
        "2026/11/26 10:00:00.250, 1755, 2619, [N/A], 45\n2026/11/26 10:00:00.500, 19"
    )
    expected = {"sm_mhz": 1755.0, "mem_mhz": 2619.0, "power_w": None, "temperature_c": 45.0}
    assert timing.last_sample(path) == expected
    path.write_text("No devices were found\n")
    assert timing.last_sample(path) == unknown
