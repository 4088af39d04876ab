"""Peak rates are plausible figures, and one that is missing leaves the others."""

import time

import pytest
import torch

from deit_fast.bench import peak_rates

CPU = torch.device("cpu")


@pytest.mark.slow
def test_peak_rates_are_plausible(device):
    found = peak_rates.peak_rates(torch.device(device), runs=3)
    assert {"copy_tb_per_s", "fp32_tflops", "fp16_tflops", "bf16_tflops"} <= set(found)
    assert all(1e-5 < value < 1e5 for value in found.values())
    a = torch.randn(1024, 1024)  # the same matmul by hand, within noise
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(10):
            a @ a
        by_hand = 10 * 2 * 1024**3 / (time.perf_counter() - start) / 1e12
        assert 0.2 < found["fp32_tflops"] / by_hand < 5


def test_a_cpus_rates_are_the_fastest_calls_and_no_row_is_compared_with_them(monkeypatch):
    times = iter([[4.0, 2.0, 8.0]] * 20)
    monkeypatch.setattr(peak_rates, "throughput_ms", lambda *args: next(times))
    monkeypatch.setattr(peak_rates, "CPU_SHAPES", ((8, 8, 8), (16, 16, 16), (16, 8, 8)))
    found = peak_rates.peak_rates(CPU)
    assert found["copy_tb_per_s"] == pytest.approx(2 * (64 << 20) / 2e9)
    assert found["fp32_tflops"] == pytest.approx(2 * 16**3 / 2e9)  # the shape with most FLOPs
    assert found["fp16_tflops"] == pytest.approx(2 * 8**3 / 2e9)
    assert peak_rates.of_rows(found, CPU) == {}
    assert peak_rates.of_rows(found, torch.device("cuda")) == found


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_peak_rates_of_quantized_matmuls(format):
    assert 1e-9 < peak_rates._quantized_matmul_tflops((32, 48, 64), format, 2, CPU) < 1e3


def test_a_peak_rate_that_does_not_run_is_left_out(monkeypatch):
    """With a warning, and the others stand; a device that is lost is not passed over."""

    class Cuda:  # as far as peak rates looks
        type = "cuda"

    def quantized(shape, format, runs, device):
        if format == "fp8":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nat ...")
        return 7.0

    for name, value in {"_copy_tb_per_s": 4.0, "_matmul_tflops": 5.0}.items():
        monkeypatch.setattr(peak_rates, name, lambda *args, value=value: value)
    monkeypatch.setattr(peak_rates, "quantized_formats", lambda device: ["fp8", "int8"])
    monkeypatch.setattr(peak_rates, "_quantized_matmul_tflops", quantized)
    monkeypatch.setattr(peak_rates, "release", lambda device: None)
    with pytest.warns(UserWarning, match="no peak rate of fp8: CUBLAS_STATUS_NOT_SUPPORTED$"):
        found = peak_rates.peak_rates(Cuda())
    assert "fp8_tflops" not in found
    assert (found["int8_tflops"], found["bf16_tflops"], found["copy_tb_per_s"]) == (7.0, 5.0, 4.0)

    def lost(*args):
        raise torch.AcceleratorError("CUDA error: an illegal memory access")

    monkeypatch.setattr(peak_rates, "_quantized_matmul_tflops", lost)
    with pytest.raises(torch.AcceleratorError):
        peak_rates.peak_rates(Cuda())
