"""python -m deit_fast.tune, on an interpreted chip with a made-up clock."""

import json
import re
import time

import pytest
import torch
from tuning import (
    CHIP,
    FP16,
    HOPPER_CONFIGS,
    LINEAR,
    NAME,
    QUANTIZED_CONFIGS,
    QUANTIZED_LINEAR,
    WIDE_BACKWARD_CONFIG,
    meta_model,
    prefer,
    run,
)

from deit_fast import tune
from deit_fast.kernels import Quantized, _tuned
from deit_fast.kernels.linear import linear_gelu_backward
from deit_fast.tune import command, operations

pytestmark = pytest.mark.cpu("made-up times must not reach this GPU's table")


def test_the_winner_is_written_and_then_serves(small, cache, capsys):
    assert run(prefer({"implementation": "triton", **HOPPER_CONFIGS[8]})) == 0
    assert "choices measured" in capsys.readouterr().out
    table = json.loads(cache.read_text())
    assert table["gpu"] == CHIP.name and table["capability"] == [9, 0]
    rows = [r for r in table["choices"] if r["op"] == "linear"]
    assert rows and all(r["ms"] == 1.0 for r in rows)
    assert all(r["choice"] == {"implementation": "triton", **HOPPER_CONFIGS[8]} for r in rows)
    assert all(set(r["others"].values()) == {2.0} for r in rows)
    for r in table["choices"]:
        assert _tuned.lookup(r["op"], r["shape"], CHIP) == r["choice"]


@pytest.mark.slow
def test_the_backward_gemm_is_tuned_for_training(small, cache, monkeypatch):
    """By the backward pass's own configurations, each once, against cuBLAS; the winner serves."""
    favourite = {"implementation": "triton", **WIDE_BACKWARD_CONFIG}
    tried = []

    def clock(call, inputs):
        (choice,) = _tuned._forced.values()
        tried.append(tuple(choice.items()))
        return prefer(favourite)(call, inputs)

    every = command.tasks
    monkeypatch.setattr(
        command, "tasks",
        lambda *args: [t for t in every(*args) if dict(t.shape).get("epilogue") == "gelu_backward"],
    )  # fmt: skip
    found = command.tasks(meta_model(), 2, FP16, CHIP, True)
    assert [dict(t.shape)["M"] for t in found] == [396, 4]
    assert not command.tasks(meta_model(), 2, FP16, CHIP)
    assert run(clock, "--training") == 0
    row, last = json.loads(cache.read_text())["choices"]  # the last block's is of few rows
    assert last["shape"]["M"] == 24 and row["shape"] == {
        "M": 12 * 18, "K": 64, "N": 256, "dtype": "float16", "epilogue": "gelu_backward",
    }  # fmt: skip
    assert row["choice"] == favourite
    assert len(tried) == 2 * len(set(tried)) == 2 * (1 + len(row["others"]))
    assert any(dict(choice)["implementation"] == "cublas" for choice in tried)
    taken, real = [], LINEAR.choose
    monkeypatch.setattr(LINEAR, "choose", lambda *args: taken.append(real(*args)) or taken[0])
    dy, weight = torch.randn(216, 64).half(), torch.randn(64, 256).half()
    linear_gelu_backward(dy, weight, torch.randn(216, 256).half(), "auto")
    assert taken == [("triton", WIDE_BACKWARD_CONFIG)]
    with _tuned.disabled():
        linear_gelu_backward(dy, weight, torch.randn(216, 256).half(), "auto")
    assert taken[1][1] in LINEAR.configs(FP16, CHIP.capability, backward=True)


def test_the_command_with_a_quantized_format(small, cache, monkeypatch, capsys):
    """The choices of the quantized model; a task that nothing serves is named, and has no row."""
    monkeypatch.setattr(QUANTIZED_LINEAR, "HOPPER_CONFIGS", QUANTIZED_CONFIGS[:2])
    every, real = command.tasks, operations.quantized_linear.quantized_linear
    monkeypatch.setattr(
        command, "tasks", lambda *args: [t for t in every(*args) if t.op == "quantized_linear"][:2]
    )
    assert run(prefer({}), "--format", "int8", "--batch", "1") == 0
    rows = json.loads(cache.read_text())["choices"]
    assert [(r["op"], r["shape"]["dtype"]) for r in rows] == [("quantized_linear", "int8")] * 2
    assert not capsys.readouterr().err.count("agreed")

    def wrong(**inputs):
        made = real(**inputs)
        return made if isinstance(made, Quantized) else made * 1.1

    monkeypatch.setattr(operations.quantized_linear, "quantized_linear", wrong)
    assert run(prefer({}), "--format", "fp8", "--batch", "1") == 0
    named = re.findall(r"dtype (\w+), epilogue (.+): no candidate ran", capsys.readouterr().err)
    assert named == [("fp8", "bias+residual")]


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do_and_renews_if_asked(small, cache, capsys):
    run(prefer({"implementation": "cublas"}))
    before = json.loads(cache.read_text())["choices"]
    other = {"op": "linear", "shape": before[0]["shape"] | {"N": 5}, "choice": before[0]["choice"]}
    table = json.loads(cache.read_text())
    table["choices"].append(other)
    cache.write_text(json.dumps(table))
    favourite = prefer({"implementation": "triton", **HOPPER_CONFIGS[1]})
    assert run(favourite) == 0
    assert "has all" in capsys.readouterr().out
    assert json.loads(cache.read_text())["choices"] == table["choices"]
    run(favourite, "--again")
    after = json.loads(cache.read_text())["choices"]
    assert len(after) == len(before) + 1 and other in after
    assert [r["choice"] for r in after if r["op"] == "linear"] != [
        r["choice"] for r in before if r["op"] == "linear"
    ]


def test_time_is_bounded(small, cache, monkeypatch, capsys):
    clock = prefer({"implementation": "cublas"})
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(call, inputs):
        now[0] += 15.0
        return clock(call, inputs)

    assert run(slow, "--minutes", "1") == 0
    out = capsys.readouterr().out
    assert "1 choices measured, 1 in all" in out and " left" in out


@pytest.mark.slow
def test_the_next_call_continues(small, cache, capsys):
    """What is in the table is not measured again, but serves the operations made of it."""
    run(prefer({"implementation": "cublas"}))
    table = json.loads(cache.read_text())
    gone = [r for r in table["choices"] if r["op"] == "attention"]
    table["choices"] = [r for r in table["choices"] if r not in gone]
    cache.write_text(json.dumps(table))
    seen = []

    def clock(call, inputs):
        seen.append(dict(_tuned._forced))
        return 1.0

    assert run(clock) == 0
    assert gone and len(seen) == sum(1 + len(r["others"]) for r in gone)
    assert all(list(forced) == ["attention"] for forced in seen)


def test_an_interrupt_keeps_the_rows_so_far(small, cache):
    count = [0]

    def interrupted(call, inputs):
        count[0] += 1
        if count[0] > 15:
            raise KeyboardInterrupt
        return 1.0

    assert run(interrupted) == 130
    assert json.loads(cache.read_text())["choices"]


def test_a_table_that_is_not_ours_is_left_as_it_is(small, cache):
    cache.parent.mkdir()
    cache.write_text('{"gpu": "NVIDIA A100", "capability": [8, 0], "choices": []}')
    before = cache.read_bytes()
    with pytest.raises(ValueError, match="another chip's"):
        run(prefer({}))
    assert cache.read_bytes() == before


def test_bad_calls_are_named(small, cache):
    with pytest.raises(ValueError, match="--batch: 0, expected 1 or more"):
        run(prefer({}), "--batch", "0")
    with pytest.raises(ValueError, match="--minutes: 0.0, expected more than 0"):
        run(prefer({}), "--minutes", "0")
    with pytest.raises(RuntimeError, match="tuning measures on a CUDA device"):
        run(None)
    assert not cache.exists()


def test_the_command_without_a_gpu(capsys):
    assert tune.main(["--model", NAME]) == 2
    assert "needs" in (err := capsys.readouterr().err) or "measures on a CUDA device" in err
