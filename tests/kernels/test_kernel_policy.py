"""Which implementation serves which chip and dtype, and what is left to PyTorch."""

import os
import subprocess
import sys

import pytest
import torch

import deit_fast
from deit_fast.bench.launches import record
from deit_fast.kernels import _checks, _chips, _policy

FP16, FP32 = torch.float16, torch.float32
V100, T4, A100, H100, B200 = (7, 0), (7, 5), (8, 0), (9, 0), (10, 0)
EVERY_OP = (*_policy.ROW_OPS, *_policy.MATMUL_OPS)


@pytest.mark.parametrize("op", EVERY_OP)
def test_cpus_and_old_chips_get_torch(op):
    for chip in (None, (6, 1)):
        assert _policy.choose(op, chip, FP16).implementation == "torch"


@pytest.mark.parametrize("chip", [V100, T4])
def test_without_tensor_cores_gemms_are_cublas(chip):
    assert _policy.choose("linear", chip, FP16).implementation == "cublas"
    assert _policy.choose("attention", chip, FP16).implementation == "torch"
    assert _policy.choose("layer_norm", chip, FP16).implementation == "triton"


@pytest.mark.parametrize("chip", [A100, H100, B200])
@pytest.mark.parametrize("op", EVERY_OP)
def test_half_precision_on_tensor_cores_is_tritons(op, chip):
    assert _policy.choose(op, chip, FP16).implementation == "triton"


@pytest.mark.parametrize("op", _policy.MATMUL_OPS)
def test_fp32_gemms_are_not(op):
    assert _policy.choose(op, H100, FP32).implementation in ("cublas", "torch")


@pytest.mark.parametrize("op", EVERY_OP)
def test_float64_is_not_tritons(op):
    assert _policy.choose(op, H100, torch.float64).implementation == "torch"


def test_autocast_decides_with_its_own_dtype(monkeypatch):
    seen = []

    def choice(op, chip, dtype):
        seen.append((op, dtype))
        return _policy.Choice("torch", "")

    monkeypatch.setattr(_policy, "choose", choice)
    with torch.autocast("cpu", FP16):
        for op in ("linear", "layer_norm"):
            _policy.resolve(op, torch.zeros(1), "auto")
    assert seen == [("linear", FP16), ("layer_norm", FP32)]


@pytest.mark.parametrize("op", EVERY_OP)
def test_every_choice_has_a_reason(op):
    for chip in (None, (6, 1), V100, A100, H100):
        for dtype in _checks.DTYPES:
            assert len(_policy.choose(op, chip, dtype).reason) > 10


def test_triton_on_a_cpu_without_the_interpreter_raises(monkeypatch):
    monkeypatch.setattr(_chips, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="of linear needs a CUDA tensor, x is on cpu"):
        _policy.resolve("linear", torch.zeros(1), "triton")
    assert _policy.resolve("linear", torch.zeros(1), "auto") == "torch"


@pytest.fixture
def exclude():
    yield _policy.exclude
    _policy.exclude()


def test_what_is_excluded_is_pytorchs(exclude):
    """Of every chip, in each operation that asks; the others stay."""
    exclude("attention", "fp8", "layer_norm_linear")
    assert _policy.choose("attention", H100, FP16).implementation == "torch"
    assert "excluded" in _policy.choose("attention", H100, FP16).reason
    assert _policy.choose("linear", H100, FP16).implementation == "triton"
    fp8, int8 = torch.float8_e4m3fn, torch.int8
    assert _policy.choose("quantized_linear", H100, fp8) == ("none", "fp8 is excluded")
    assert _policy.choose("quantized_linear", H100, int8).implementation == "triton"
    exclude("linear")
    assert _policy.choose("attention", H100, FP16).implementation == "triton"
    assert _policy.choose("linear", H100, FP16).implementation == "torch"


@pytest.mark.parametrize(
    ("name", "missing", "there"),
    [
        ("attention", "attention", "linear"),
        ("layer_norm_linear", "layer_norm_linear", "linear"),
        ("linear", "linear", "attention"),
        ("classifier", "classifier", "linear"),
    ],
)
def test_a_model_without_what_is_excluded(exclude, name, missing, there):
    exclude(name)
    with torch.device("meta"):
        model = deit_fast.deit_tiny_distilled(depth=2)
    recorder = record(model, 256, FP16, _chips.Chip("H100", H100, 132), tables=False)
    ops = {op for op, _, _ in recorder.calls}
    assert missing not in ops and there in ops
    exclude()
    recorder = record(model, 256, FP16, _chips.Chip("H100", H100, 132), tables=False)
    assert missing in {op for op, _, _ in recorder.calls}


@pytest.mark.slow
def test_unknown_exclusions(exclude):
    with pytest.raises(ValueError, match="unknown atention, expected some of"):
        exclude("atention", "linear")
    assert not _policy.excluded()
    code = "import deit_fast; print(sorted(deit_fast.kernels.excluded()))"
    for value, expected in (("fp8, linear", "['fp8', 'linear']"), ("liner", "unknown liner")):
        env = os.environ | {"DEIT_FAST_EXCLUDE": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert expected in done.stdout + done.stderr
