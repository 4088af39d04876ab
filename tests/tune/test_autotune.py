"""Candidates are checked before they are timed, and one that fails is out."""

import json

import pytest
import torch
from modelling import tiny_pair
from torch._subclasses.fake_tensor import FakeTensorMode
from tuning import (
    CHIP,
    HOPPER_CONFIGS,
    QUANTIZED_CONFIGS,
    QUANTIZED_LINEAR,
    prefer,
    replace_linear,
    run,
)

import deit_fast
from benchmarks.accuracy import short_sums
from deit_fast import tune
from deit_fast.bench import timing
from deit_fast.kernels import Quantized, _tuned, quantize_reference
from deit_fast.tune import command, operations

pytestmark = pytest.mark.cpu("made-up times must not reach this GPU's table")


def test_a_wrong_quantized_candidate_is_out(monkeypatch):
    monkeypatch.setattr(timing, "rotation", lambda make, nbytes, device: [make()])
    model = tiny_pair("auto", depth=2)[1].half()
    deit_fast.quantize(model, "int8")
    monkeypatch.setattr(QUANTIZED_LINEAR, "HOPPER_CONFIGS", QUANTIZED_CONFIGS[:2])
    real = operations.quantized_linear.quantized_linear

    def wrong(**inputs):
        made = real(**inputs)
        made.scales.mul_(1.1)
        return made

    monkeypatch.setattr(operations.quantized_linear, "quantized_linear", wrong)
    found = tune.tasks(model, 1, torch.float16, CHIP)
    task = next(t for t in found if "quantized" in dict(t.shape).get("epilogue", ""))
    assert not list(tune.autotune([task], torch.device("cpu"), lambda *_: 1.0, float("inf")))


def test_short_sums_are_allowed_on_a_gpu_only():
    """sm_90's fp8 instruction keeps 14 bits: more than twice the reference's error at once."""
    x = quantize_reference(torch.ones(2, 32))
    assert tune.allowance({"x": x}) == 1e-6
    with FakeTensorMode():
        values = torch.empty(2, 32, device="cuda", dtype=torch.float8_e4m3fn)
        wide = torch.empty(2, 32, device="cuda")
    assert tune.allowance({"x": wide}) == 1e-6
    allowed = tune.allowance({"x": Quantized(values, wide)})
    assert allowed > short_sums(1536, 16)["sums"] > 2.1e-4


@pytest.mark.slow
def test_a_candidate_that_is_wrong_or_fails_is_out(small, cache, monkeypatch):
    """The clock's favourite computes something else, and another does not launch."""
    wrong, broken = HOPPER_CONFIGS[8], HOPPER_CONFIGS[0]
    real = operations.linear.linear

    def run_linear(*args, **kwargs):
        forced = _tuned._forced.get("linear", {})
        if all(forced.get(k) == v for k, v in broken.items()):
            raise RuntimeError("out of resources")
        y = real(*args, **kwargs)
        out = y[0] if isinstance(y, tuple) else y
        if all(forced.get(k) == v for k, v in wrong.items()):
            out.add_(0.1)
        return y

    replace_linear(monkeypatch, run_linear)
    assert run(prefer({"implementation": "triton", **wrong})) == 0
    plain = [
        r
        for r in json.loads(cache.read_text())["choices"]
        if r["op"] == "linear" and "folded" not in r["shape"]["epilogue"]
    ]
    assert plain
    for r in plain:
        assert r["choice"] != {"implementation": "triton", **wrong}
        assert [name for name, ms in r["others"].items() if ms is None]


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("lost")])
def test_an_error_outside_the_candidates_keeps_the_rows_so_far(small, cache, monkeypatch, error):
    """Memory: that task is left out. Anything else: the rows so far are written, then it raises."""
    count = [0]
    real = timing.rotation

    def failing(*args):
        count[0] += 1
        if count[0] == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(timing, "rotation", failing)
    if isinstance(error, torch.OutOfMemoryError):
        assert run(prefer({})) == 0
    else:
        with pytest.raises(RuntimeError, match="lost"):
            run(prefer({}))
    written = len(json.loads(cache.read_text())["choices"])
    assert written == 2 if str(error) == "lost" else written > 2


def test_a_lost_device_ends_the_benchmark(small, cache):
    """Triton's own error for it is a RuntimeError, as that of a tile that does not fit is."""
    calls = []

    def clock(call, inputs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return 1.0

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(clock)
    assert len(calls) == 3


@pytest.mark.slow
def test_wrong_row_stats_are_out(small, cache, monkeypatch):
    wrong = HOPPER_CONFIGS[0]
    real = operations.linear.linear

    def run_linear(*args, **kwargs):
        y = real(*args, **kwargs)
        forced = _tuned._forced.get("linear", {})
        if isinstance(y, tuple) and all(forced.get(k) == v for k, v in wrong.items()):
            y[1][:, 0] += 0.1
        return y

    def emits(task):
        return "row_stats" in dict(task.shape).get("epilogue", "")

    every = command.tasks
    monkeypatch.setattr(command, "tasks", lambda *args: filter(emits, every(*args)))
    replace_linear(monkeypatch, run_linear)
    run(prefer({"implementation": "triton", **wrong}), "--batch", "30")
    rows = json.loads(cache.read_text())["choices"]
    emitting = [r for r in rows if "row_stats" in r["shape"].get("epilogue", "")]
    assert emitting and all(r["ms"] == 2.0 for r in emitting)
