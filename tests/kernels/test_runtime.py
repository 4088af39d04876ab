"""Which implementation serves which chip, and that the choice can be asked for and explained."""

import pytest
import torch

from deit_fast.kernels import _runtime

FP16, FP32 = torch.float16, torch.float32
V100, T4, A100, H100, B200 = (7, 0), (7, 5), (8, 0), (9, 0), (10, 0)
EVERY_OP = (*_runtime.ROW_KERNELS, *_runtime.PRODUCTS)


@pytest.mark.parametrize("op", EVERY_OP)
def test_cpu_and_ancient_chips_get_torch(op):
    for chip in (None, (6, 1)):
        assert _runtime.choose(op, chip, FP16).implementation == "torch"


@pytest.mark.parametrize("chip", [V100, T4])
def test_without_tensor_cores_products_belong_to_cublas(chip):
    assert _runtime.choose("linear", chip, FP16).implementation == "cublas"
    assert _runtime.choose("attention", chip, FP16).implementation == "torch"
    assert _runtime.choose("layer_norm", chip, FP16).implementation == "triton"


@pytest.mark.parametrize("chip", [A100, H100, B200])
@pytest.mark.parametrize("op", EVERY_OP)
def test_half_precision_on_tensor_cores_is_tritons(op, chip):
    assert _runtime.choose(op, chip, FP16).implementation == "triton"


@pytest.mark.parametrize("op", _runtime.PRODUCTS)
def test_fp32_products_are_not(op):
    assert _runtime.choose(op, H100, FP32).implementation in ("cublas", "torch")


@pytest.mark.parametrize("op", EVERY_OP)
def test_float64_is_not_tritons(op):
    assert _runtime.choose(op, H100, torch.float64).implementation == "torch"


def test_autocast_decides_with_its_own_dtype(monkeypatch):
    seen = []

    def choice(op, chip, dtype):
        seen.append((op, dtype))
        return _runtime.Choice("torch", "")

    monkeypatch.setattr(_runtime, "choose", choice)
    with torch.autocast("cpu", FP16):
        for op in ("linear", "layer_norm"):
            _runtime.resolve(op, torch.zeros(1), "auto")
    assert seen == [("linear", FP16), ("layer_norm", FP32)]


@pytest.mark.parametrize("op", EVERY_OP)
def test_every_choice_has_a_reason(op):
    for chip in (None, (6, 1), V100, A100, H100):
        for dtype in _runtime.DTYPES:
            assert len(_runtime.choose(op, chip, dtype).reason) > 10


def test_triton_on_a_cpu_without_the_interpreter_raises(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="of linear needs a CUDA tensor, x is on cpu"):
        _runtime.resolve("linear", torch.zeros(1), "triton")
    assert _runtime.resolve("linear", torch.zeros(1), "auto") == "torch"


def test_the_chip_is_a_constant_under_compile(monkeypatch):
    monkeypatch.setattr(_runtime, "chip", lambda device: _runtime.Chip("H100", H100, 132))

    def f(x):
        choice = _runtime.choose("linear", _runtime.capability("cuda", 0), FP16)
        return x + 1 if choice.implementation == "triton" else x - 1

    assert torch.compile(f, fullgraph=True)(torch.zeros(1)) == 1


@pytest.mark.gpu
def test_the_device_of_the_tensor_decides():
    x = torch.zeros(1, device="cuda")
    assert _runtime.resolve("layer_norm", x, "auto") == "triton"
    assert _runtime.resolve("layer_norm", x.cpu(), "auto") == "torch"
