"""python -m deit_fast.tune, on an interpreted chip with a made-up clock."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from modelling import TINY, images, tiny_pair
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.interpreter import GridExecutor

import deit_fast
from benchmarks.accuracy import short_sums
from deit_fast import tune
from deit_fast.kernels import _chips, _tuned
from deit_fast.kernels.linear import linear_gelu_backward
from deit_fast.kernels.linear.configs import HOPPER_CONFIGS, WIDE_BACKWARD_CONFIG
from deit_fast.kernels.quantized_linear.configs import HOPPER_CONFIGS as EIGHT_BITS_CONFIGS

CHIP = _chips.Chip("NVIDIA H9000", (9, 0), 4)
NAME = "deit_tiny_distilled"
FP16 = torch.float16

pytestmark = pytest.mark.cpu("made-up times must not reach this GPU's table")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path))
    _tuned.forget()
    with _chips.simulate_device(CHIP):
        yield tmp_path / "tuned" / "h9000.json"
    _tuned.forget()


def meta_model(name=NAME, **options):
    with torch.device("meta"):
        return deit_fast.create_model(name, backend="triton", **options)


def names(tasks):
    return [(t.op, dict(t.shape).get("epilogue", "")) for t in tasks]


def test_tasks_of_deit_tiny():
    found = tune.tasks(meta_model(), 256, torch.bfloat16, _chips.Chip("H200", (9, 0), 132))
    shapes = [dict(t.shape) for t in found]
    assert len(found) == len(set(found)) == len({str(t) for t in found})
    folded = {(s["K"], s["N"]) for s in shapes if s.get("epilogue") == "folded+bias"}
    assert folded == {(192, 576), (192, 384)}  # and the last block's keys and values
    for epilogue in ("bias+residual+row_stats", "folded+bias+gelu", "bias+gelu"):
        assert any(s.get("epilogue") == epilogue for s in shapes), epilogue
    order = [tune.ORDER.index(t.op) for t in found]
    assert order == sorted(order) and set(order) == {0, 1, 2, 3}
    (mlp,) = [t for t in found if t.op == "layer_norm_mlp"]
    assert dict(mlp.shape) == {"M": 50688, "D": 192, "hidden": 768, "dtype": "bfloat16"}
    for task in found:
        problems = [
            _tuned._validators[task.op](dict(task.shape), dict(choice), (9, 0))
            for choice in task.candidates
        ]
        assert len(problems) > 1 and not any(problems), (task, problems)


def test_every_moment_is_known_in_the_race():
    """Of the two kinds of calls for qkv, with and without row statistics, the one of eleven blocks."""
    found = tune.tasks(meta_model(), 256, torch.bfloat16, _chips.Chip("H200", (9, 0), 132))
    for task in found:
        if task.op in ("layer_norm_linear", "layer_norm_mlp"):
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
    """Every shape under which a forward pass looks for a choice is one that tuning settles."""
    model = tiny_pair("auto", depth=3)[1].half()
    asked = asked_by(model, monkeypatch)
    assert {op for op, _ in asked} >= {"linear", "attention", "layer_norm_linear"}
    settled = {
        (task.op, frozenset(item for item in task.shape if item[0] != "M"))
        for task in tune.tasks(model, 96, torch.float16, CHIP)
    }
    # whether to fold is asked for the prefix tokens' queries too, which are too few for it
    few = ("layer_norm_linear", frozenset({"K": 64, "N": 64, "dtype": "float16"}.items()))
    assert asked - settled <= {few}


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_tasks_of_a_model_in_eight_bits(format, monkeypatch):
    """Every choice is settled, by candidates that may serve it and agree with the reference."""
    monkeypatch.setattr(tune.timing, "rotation", lambda make, nbytes, device: [make()])
    model = tiny_pair("auto", depth=2)[1].half()
    deit_fast.quantize(model, format)
    asked = asked_by(model, monkeypatch)
    found = tune.tasks(model, 96, torch.float16, CHIP)
    settled = {
        (task.op, frozenset(item for item in task.shape if item[0] != "M")) for task in found
    }
    assert asked <= settled and {"quantized_linear", "attention"} <= {op for op, _ in asked}
    found = [task for task in found if task.op == "quantized_linear"]
    kinds = {dict(task.shape)["epilogue"] for task in found}
    product = "bias+gelu+quantized" if format == "fp8" else "bias+gelu+quantized+own_scales"
    second = "bias+residual" if format == "fp8" else "parts+bias+residual"
    assert kinds == {"bias", product, second}
    for task in found:
        shape, choices = dict(task.shape), [dict(c) for c in task.candidates]
        validate = _tuned._validators[task.op]
        assert len(choices) >= 3 and not any(validate(shape, c, (9, 0)) for c in choices)
    # interpreted, all of them would take a minute
    monkeypatch.setattr(tune.quantized_linear, "HOPPER_CONFIGS", EIGHT_BITS_CONFIGS[:2])
    few = {dict(task.shape).get("epilogue"): task for task in tune.tasks(model, 1, FP16, CHIP)}
    few = [task for task in few.values() if task.op == "quantized_linear"]
    rows = list(tune.settle(few, torch.device("cpu"), lambda call, inputs: 1.0, float("inf")))
    assert len(rows) == len(few) == 3
    for row in rows:
        assert all(row.others.values()) and row.choice["implementation"] == "triton"


def test_a_candidate_in_eight_bits_that_disagrees_is_out(monkeypatch):
    monkeypatch.setattr(tune.timing, "rotation", lambda make, nbytes, device: [make()])
    model = tiny_pair("auto", depth=2)[1].half()
    deit_fast.quantize(model, "int8")
    monkeypatch.setattr(tune.quantized_linear, "HOPPER_CONFIGS", EIGHT_BITS_CONFIGS[:2])
    real = tune.run_quantized_linear

    def wrong(**inputs):
        made = real(**inputs)
        made.scales.mul_(1.1)
        return made

    monkeypatch.setattr(tune, "run_quantized_linear", wrong)
    found = tune.tasks(model, 1, torch.float16, CHIP)
    task = next(t for t in found if "quantized" in dict(t.shape).get("epilogue", ""))
    assert not list(tune.settle([task], torch.device("cpu"), lambda *_: 1.0, float("inf")))


def run(clock, *arguments):
    import argparse

    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    args = ["--model", NAME, "--dtype", "fp16", "--batch", "12", *arguments]
    return tune.run(parser.parse_args(args), clock)


@pytest.fixture
def small(monkeypatch):
    """Everything of the tiny model, and one set of inputs: a made-up clock has no cache."""
    monkeypatch.setattr(tune.timing, "rotation", lambda make, nbytes, device: [make()])
    few = [HOPPER_CONFIGS[i] for i in (0, 1, 2, 8)]  # the rule's and one more: interpreted, all
    monkeypatch.setattr(tune.linear, "HOPPER_CONFIGS", few)  # of them would take minutes
    options = TINY | {"embed_dim": 64}
    monkeypatch.setattr(
        tune, "create_model", lambda name, **kw: deit_fast.create_model(name, **(options | kw))
    )


def prefer(favourite):
    """A clock that finds `favourite`, if it is among the candidates, the fastest."""

    def clock(call, inputs):
        choices = [tuple(c.items()) for c in _tuned._forced.values()]
        return 1.0 if any(set(favourite.items()) <= set(c) for c in choices) else 2.0

    return clock


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
def test_the_backward_product_is_settled_for_training(small, cache, monkeypatch):
    """By the backward pass's own configurations, each once, against cuBLAS; the winner serves."""
    favourite = {"implementation": "triton", **WIDE_BACKWARD_CONFIG}
    tried = []

    def clock(call, inputs):
        (choice,) = _tuned._forced.values()
        tried.append(tuple(choice.items()))
        return prefer(favourite)(call, inputs)

    every = tune.tasks
    monkeypatch.setattr(
        tune, "tasks",
        lambda *args: [t for t in every(*args) if dict(t.shape).get("epilogue") == "gelu_backward"],
    )  # fmt: skip
    assert [dict(t.shape)["M"] for t in tune.tasks(meta_model(), 2, FP16, CHIP, True)] == [396, 4]
    assert not tune.tasks(meta_model(), 2, FP16, CHIP)
    assert run(clock, "--training") == 0
    row, last = json.loads(cache.read_text())["choices"]  # the last block's is of few rows
    assert last["shape"]["M"] == 24 and row["shape"] == {
        "M": 12 * 18, "K": 64, "N": 256, "dtype": "float16", "epilogue": "gelu_backward",
    }  # fmt: skip
    assert row["choice"] == favourite
    assert len(tried) == 2 * len(set(tried)) == 2 * (1 + len(row["others"]))
    assert any(dict(choice)["implementation"] == "cublas" for choice in tried)
    taken, real = [], tune.linear.choose
    monkeypatch.setattr(tune.linear, "choose", lambda *args: taken.append(real(*args)) or taken[0])
    dy, weight = torch.randn(216, 64).half(), torch.randn(64, 256).half()
    linear_gelu_backward(dy, weight, torch.randn(216, 256).half(), "auto")
    assert taken == [("triton", WIDE_BACKWARD_CONFIG)]
    with _tuned.disabled():
        linear_gelu_backward(dy, weight, torch.randn(216, 256).half(), "auto")
    assert taken[1][1] in tune.linear.configs(FP16, CHIP.capability, backward=True)


def test_the_command_in_eight_bits(small, cache, monkeypatch, capsys):
    """The choices of the quantised model; what nothing serves is named, and not in the table."""
    monkeypatch.setattr(tune.quantized_linear, "HOPPER_CONFIGS", EIGHT_BITS_CONFIGS[:2])
    every, real = tune.tasks, tune.run_quantized_linear
    monkeypatch.setattr(
        tune, "tasks", lambda *args: [t for t in every(*args) if t.op == "quantized_linear"][:2]
    )
    assert run(prefer({}), "--format", "int8", "--batch", "1") == 0
    rows = json.loads(cache.read_text())["choices"]
    assert [(r["op"], r["shape"]["dtype"]) for r in rows] == [("quantized_linear", "int8")] * 2
    assert not capsys.readouterr().err.count("agreed")

    def wrong(**inputs):
        made = real(**inputs)
        return made if isinstance(made, tune.Quantized) else made * 1.1

    monkeypatch.setattr(tune, "run_quantized_linear", wrong)
    assert run(prefer({}), "--format", "fp8", "--batch", "1") == 0
    named = re.findall(r"dtype (\w+), epilogue (.+): no candidate ran", capsys.readouterr().err)
    assert named == [("fp8", "bias+residual")]


def test_short_sums_are_allowed_on_a_gpu_only():
    """sm_90's fp8 instruction keeps 14 bits: more than twice the reference's error at once."""
    x = tune.quantize_reference(torch.ones(2, 32))
    assert tune.allowance({"x": x}) == 1e-6
    with FakeTensorMode():
        values = torch.empty(2, 32, device="cuda", dtype=torch.float8_e4m3fn)
        wide = torch.empty(2, 32, device="cuda")
    assert tune.allowance({"x": wide}) == 1e-6
    allowed = tune.allowance({"x": tune.Quantized(values, wide)})
    assert allowed > short_sums(1536, 16)["sums"] > 2.1e-4


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


@pytest.mark.slow
def test_a_candidate_that_disagrees_or_fails_is_out(small, cache, monkeypatch):
    """The clock's favourite computes something else, and another does not launch."""
    wrong, broken = HOPPER_CONFIGS[8], HOPPER_CONFIGS[0]
    real = tune.run_linear

    def run_linear(*args, **kwargs):
        forced = _tuned._forced.get("linear", {})
        if all(forced.get(k) == v for k, v in broken.items()):
            raise RuntimeError("out of resources")
        y = real(*args, **kwargs)
        out = y[0] if isinstance(y, tuple) else y
        if all(forced.get(k) == v for k, v in wrong.items()):
            out.add_(0.1)
        return y

    monkeypatch.setattr(tune, "run_linear", run_linear)
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
def test_the_next_call_goes_on(small, cache, capsys):
    """What is in the table is not raced again, but serves what is made of it."""
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


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("lost")])
def test_an_error_outside_the_candidates_keeps_what_was_settled(small, cache, monkeypatch, error):
    """Memory: that task is left out. Anything else: what was settled is written, then it raises."""
    count = [0]
    real = tune.timing.rotation

    def failing(*args):
        count[0] += 1
        if count[0] == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(tune.timing, "rotation", failing)
    if isinstance(error, torch.OutOfMemoryError):
        assert run(prefer({})) == 0
    else:
        with pytest.raises(RuntimeError, match="lost"):
            run(prefer({}))
    settled = len(json.loads(cache.read_text())["choices"])
    assert settled == 2 if str(error) == "lost" else settled > 2


def test_a_lost_device_ends_the_race(small, cache):
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
    real = tune.run_linear

    def run_linear(*args, **kwargs):
        y = real(*args, **kwargs)
        forced = _tuned._forced.get("linear", {})
        if isinstance(y, tuple) and all(forced.get(k) == v for k, v in wrong.items()):
            y[1][:, 0] += 0.1
        return y

    def emits(task):
        return "row_stats" in dict(task.shape).get("epilogue", "")

    every = tune.tasks
    monkeypatch.setattr(tune, "tasks", lambda *args: filter(emits, every(*args)))
    monkeypatch.setattr(tune, "run_linear", run_linear)
    run(prefer({"implementation": "triton", **wrong}), "--batch", "30")
    rows = json.loads(cache.read_text())["choices"]
    emitting = [r for r in rows if "row_stats" in r["shape"].get("epilogue", "")]
    assert emitting and all(r["ms"] == 2.0 for r in emitting)


@pytest.mark.slow
def test_tasks_without_the_interpreter():
    """On a machine with a GPU nothing is interpreted: listing what to tune must not need it."""
    code = (
        "import torch; from deit_fast import tune; from deit_fast.kernels._chips import Chip\n"
        "with torch.device('meta'): model = tune.create_model('deit_tiny')\n"
        "print(len(tune.tasks(model, 256, torch.bfloat16, Chip('H', (9, 0), 132))))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_an_interrupt_keeps_what_was_settled(small, cache):
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
