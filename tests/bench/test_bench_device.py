"""What the device says of itself."""

import pytest
import torch

from deit_fast.bench import device

CPU = torch.device("cpu")


def test_folder_names(monkeypatch):
    names = {
        "NVIDIA H200": "h200",
        "Tesla V100-SXM2-16GB": "tesla-v100-sxm2-16gb",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q": "rtx-pro-6000-blackwell-max-q",
    }
    for name, folder in names.items():
        monkeypatch.setattr(device, "device_name", lambda device, name=name: name)
        assert device.slug(torch.device("cuda")) == folder


CPUS = {  # /proc/cpuinfo -> name, folder
    "model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz": (
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu-intel-xeon-platinum-8481c",
    ),
    "model name\t: AMD EPYC 7763 64-Core Processor   ": (
        "AMD EPYC 7763 64-Core Processor", "cpu-amd-epyc-7763",
    ),
    "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1": (
        "AMD EPYC (family 25, model 17)", "cpu-amd-epyc-family-25-model-17",
    ),
    "model name\t: AMD Ryzen 7 7840U w/ Radeon 780M Graphics": (
        "AMD Ryzen 7 7840U w/ Radeon 780M Graphics", "cpu-amd-ryzen-7-7840u",
    ),
    "CPU part\t: 0xd0c": ("aarch64", "cpu-aarch64"),
}  # fmt: skip


@pytest.mark.parametrize("text", CPUS)
def test_folder_names_of_cpus(text, tmp_path, monkeypatch):
    """The same wherever that CPU is: cores, clock and graphics are not in it."""
    (tmp_path / "cpuinfo").write_text(text + "\n")
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(device.platform, "processor", lambda: "")
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
    assert (device.device_name(CPU), device.slug(CPU)) == CPUS[text]


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_quantized_formats_of_a_chip(format):
    assert device.quantized_formats(CPU) == ["fp8", "int8"]
    least = {"fp8": (8, 9), "int8": (8, 0)}[format]
    assert device.why_no_quantized_matmul(format, least) is None
    assert "compute capability" in device.why_no_quantized_matmul(format, (7, 5))
    assert "needs compute capability 8.9" in device.why_no_quantized_matmul("fp8", (8, 6))


def test_hardware_says_what_this_is():
    found = device.hardware(CPU)
    assert found["gpu"] is None and found["cpu"] and found["threads"] >= 1
    assert found["torch"].startswith(torch.__version__.partition("+")[0])


def test_the_last_sample_of_the_clocks(tmp_path):
    path = tmp_path / "clocks.csv"
    unknown = {"sm_mhz": None, "mem_mhz": None, "power_w": None, "temperature_c": None}
    assert device.last_sample(path) == unknown
    path.write_text("2026/11/26 10:00:00.000, 1980, 26")
    assert device.last_sample(path) == unknown  # no whole line yet
    path.write_text(
        "2026/11/26 10:00:00.000, 345, 2619, 80.1, 31\n"
        "2026/11/26 10:00:00.250, 1755, 2619, [N/A], 45\n2026/11/26 10:00:00.500, 19"
    )
    expected = {"sm_mhz": 1755.0, "mem_mhz": 2619.0, "power_w": None, "temperature_c": 45.0}
    assert device.last_sample(path) == expected
    path.write_text("No devices were found\n")
    assert device.last_sample(path) == unknown
