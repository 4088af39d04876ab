"""What a chip is: of a tensor's device, simulated, and the limits that a table knows."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deit_fast.kernels import _chips, _policy

H100 = _chips.Chip("H100", (9, 0), 132)


def test_the_chip_is_a_constant_under_compile(monkeypatch):
    monkeypatch.setattr(_chips, "chip", lambda device: H100)

    def f(x):
        choice = _policy.choose("linear", _chips.capability("cuda", 0), torch.float16)
        return x + 1 if choice.implementation == "triton" else x - 1

    assert torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_the_device_of_the_tensor_decides(monkeypatch):
    monkeypatch.setattr(_chips, "_cuda_chip", lambda index: H100)
    with FakeTensorMode():
        on_gpu, on_cpu = (torch.zeros(1, device=device) for device in ("cuda:0", "cpu"))
    assert on_gpu.is_cuda and _policy.resolve("layer_norm", on_gpu, "auto") == "triton"
    assert _policy.resolve("layer_norm", on_cpu, "auto") == "torch"


def test_a_simulated_chip_is_every_device_s():
    assert not _chips.is_simulated() and _chips.capability("cpu", None) is None
    with _chips.simulate_device(H100):
        assert _chips.is_simulated() and _chips.capability("cpu", None) == (9, 0)
        assert _chips.chip(torch.device("cpu")) == _chips.chip(torch.device("meta")) == H100
        with _chips.simulate_device(_chips.Chip("A100", (8, 0), 108)):
            assert _chips.chip(torch.device("cpu")).name == "A100"
        assert _chips.chip(torch.device("cpu")) == H100
    assert not _chips.is_simulated()


def test_limits_are_the_cuda_programming_guide_s():
    """Technical specifications per compute capability: KB per block, threads per SM."""
    kilobytes = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227}
    assert {arch: 1024 * size for arch, size in kilobytes.items()} == _chips.SHARED_MEMORY_LIMIT
    threads = {70: 2048, 75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048}
    assert threads == _chips.THREADS_LIMIT
