"""The tasks of a model: every shape under which it will look for a choice."""

import os
import subprocess
import sys

import pytest
import torch
from modelling import images, tiny_pair
from triton.runtime.interpreter import GridExecutor
from tuning import CHIP, FP16, QUANTIZED_CONFIGS, QUANTIZED_LINEAR, meta_model

import deit_fast
from deit_fast import tune
from deit_fast.bench import timing
from deit_fast.kernels import _chips, _tuned
from deit_fast.tune.model_tasks import ORDER

pytestmark = pytest.mark.cpu("made-up times must not reach this GPU's table")


def names(tasks):
    return [(t.op, dict(t.shape).get("epilogue", "")) for t in tasks]


def test_tasks_of_deit_tiny():
    found = tune.tasks(meta_model(), 256, torch.bfloat16, _chips.Chip("H200", (9, 0), 132))
    shapes = [dict(t.shape) for t in found]
    assert len(found) == len(set(found)) == len({str(t) for t in found})
    folded = {(s["K"], s["N"]) for s in shapes if s.get("epilogue") == "folded+bias"}
    # the last block's keys and values, and its queries
    assert folded == {(192, 576), (192, 384), (192, 192)}
    for epilogue in ("bias+residual+row_stats", "folded+bias+gelu", "bias+gelu"):
        assert any(s.get("epilogue") == epilogue for s in shapes), epilogue
    order = [ORDER.index(t.op) for t in found]
    assert order == sorted(order) and set(order) == {0, 1, 2, 3}
    (mlp, _) = [t for t in found if t.op == "layer_norm_mlp"]  # and of the prefix tokens
    assert dict(mlp.shape) == {"M": 50688, "D": 192, "hidden": 768, "dtype": "bfloat16"}
    for task in found:
        problems = [
            _tuned._validators[task.op](dict(task.shape), dict(choice), (9, 0))
            for choice in task.candidates
        ]
        assert len(problems) > 1 and not any(problems), (task, problems)


def test_row_stats_are_among_the_inputs_of_a_task():
    """Of the two kinds of calls for qkv, the one of eleven blocks: with row statistics. The prefix
    tokens, 256 rows, have none."""
    found = tune.tasks(meta_model(), 256, torch.bfloat16, _chips.Chip("H200", (9, 0), 132))
    for task in found:
        many = dict(task.shape).get("M") == 50688
        if many and task.op in ("layer_norm_linear", "layer_norm_mlp"):
            made = task.make(torch.device("meta"))
            assert made["row_stats"].shape[:2] == (3, 2), task


def asked_by(model, monkeypatch):
    """(op, shape without M) of every choice that a forward pass looks for."""
    x = images(model, batch=96).half()
    asked = set()
    real = _tuned.lookup

    def spy(op, shape, chip):
        asked.add((op, frozenset((k, v) for k, v in shape.items() if k != "M")))
        return real(op, shape, chip)

    with torch.no_grad():
        monkeypatch.setattr(_tuned, "lookup", spy)
        monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)  # no launches
        model(x)
        monkeypatch.undo()
    return asked


def test_tasks_ask_what_the_model_will_look_up(monkeypatch):
    """Every shape under which a forward pass looks for a choice is one that tuning covers."""
    model = tiny_pair("auto", depth=3)[1].half()
    asked = asked_by(model, monkeypatch)
    assert {op for op, _ in asked} >= {"linear", "attention", "layer_norm_linear"}
    tuned = {
        (task.op, frozenset(item for item in task.shape if item[0] != "M"))
        for task in tune.tasks(model, 96, torch.float16, CHIP)
    }
    assert asked <= tuned


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_tasks_of_a_quantized_model(format, monkeypatch):
    """Every choice is tuned, by candidates that may serve it and agree with the reference."""
    monkeypatch.setattr(timing, "rotation", lambda make, nbytes, device: [make()])
    model = tiny_pair("auto", depth=2)[1].half()
    deit_fast.quantize(model, format)
    asked = asked_by(model, monkeypatch)
    found = tune.tasks(model, 96, torch.float16, CHIP)
    tuned = {(task.op, frozenset(item for item in task.shape if item[0] != "M")) for task in found}
    assert asked <= tuned and {"quantized_linear", "attention"} <= {op for op, _ in asked}
    found = [task for task in found if task.op == "quantized_linear"]
    kinds = {dict(task.shape)["epilogue"] for task in found}
    first = "bias+gelu+quantized" if format == "fp8" else "bias+gelu+quantized+own_scales"
    second = "bias+residual" if format == "fp8" else "parts+bias+residual"
    assert kinds == {"bias", first, second}
    for task in found:
        shape, choices = dict(task.shape), [dict(c) for c in task.candidates]
        validate = _tuned._validators[task.op]
        assert len(choices) >= 3 and not any(validate(shape, c, (9, 0)) for c in choices)
    # interpreted, all of them would take a minute
    monkeypatch.setattr(QUANTIZED_LINEAR, "HOPPER_CONFIGS", QUANTIZED_CONFIGS[:2])
    few = {dict(task.shape).get("epilogue"): task for task in tune.tasks(model, 1, FP16, CHIP)}
    few = [task for task in few.values() if task.op == "quantized_linear"]
    rows = list(tune.autotune(few, torch.device("cpu"), lambda call, inputs: 1.0, float("inf")))
    assert len(rows) == len(few) == 3
    for row in rows:
        assert all(row.others.values()) and row.choice["implementation"] == "triton"


@pytest.mark.slow
def test_tasks_without_the_interpreter():
    """On a machine with a GPU nothing is interpreted: listing what to tune must not need it."""
    code = (
        "import torch\n"
        "from deit_fast import tune\n"
        "from deit_fast.kernels._chips import Chip\n"
        "from deit_fast.models import create_model\n"
        "with torch.device('meta'): model = create_model('deit_tiny')\n"
        "print(len(tune.tasks(model, 256, torch.bfloat16, Chip('H', (9, 0), 132))))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
