"""python -m deit_fast.tune, on an interpreted chip with a made-up clock."""

import json
import time

import pytest
import torch
from modelling import TINY

import deit_fast
from deit_fast import tune
from deit_fast.bench.launches import record
from deit_fast.kernels import _runtime, _tuned
from deit_fast.kernels.linear import HOPPER_CONFIGS

CHIP = _runtime.Chip("NVIDIA H9000", (9, 0), 4)
NAME = "deit_tiny_distilled"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("made-up times must not reach this GPU's table")
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path))
    _tuned.forget()
    with _runtime.pretend(CHIP):
        yield tmp_path / "tuned" / "h9000.json"
    _tuned.forget()


def meta_model(name=NAME, **options):
    with torch.device("meta"):
        return deit_fast.create_model(name, backend="triton", **options)


def names(tasks):
    return [(t.op, dict(t.shape).get("epilogue", "")) for t in tasks]


def test_tasks_of_deit_tiny():
    found = tune.tasks(meta_model(), 256, torch.bfloat16, _runtime.Chip("H200", (9, 0), 132))
    shapes = [dict(t.shape) for t in found]
    assert len(found) == len(set(found)) == len({str(t) for t in found})
    folded = {(s["K"], s["N"]) for s in shapes if s.get("epilogue") == "folded+bias"}
    assert folded == {(192, 576), (192, 384)}  # and the last block's keys and values
    for epilogue in ("bias+residual+moments", "folded+bias+gelu", "bias+gelu"):
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


def test_tasks_ask_what_the_model_will_look_up(monkeypatch):
    """Every shape under which a forward pass looks for a choice is one that tuning settles."""
    settled = {(t.op, t.shape) for t in tune.tasks(meta_model(), 256, torch.float16, CHIP)}
    asked = set()
    real = _tuned.implementation

    def spy(op, shape, *on):
        asked.add((op, frozenset(shape)))
        return real(op, shape, *on)

    monkeypatch.setattr(_tuned, "implementation", spy)
    record(meta_model(), 256, torch.float16, CHIP)
    without_m = {(op, frozenset(i for i in shape if i[0] != "M")) for op, shape in settled}
    assert {op for op, _ in asked} == {"layer_norm_linear", "layer_norm_mlp"}
    few = {entry for entry in asked if entry not in without_m}
    assert all(dict(shape).get("N") == 192 or op == "layer_norm_mlp" for op, shape in few), few


def run(clock, *arguments):
    import argparse

    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    args = ["--model", NAME, "--dtype", "fp16", "--batch", "12", *arguments]
    return tune.run(parser.parse_args(args), clock)


@pytest.fixture
def small(monkeypatch):
    """Everything of the tiny model."""
    options = TINY | {"embed_dim": 64}
    monkeypatch.setattr(
        tune, "create_model", lambda name, **kw: deit_fast.create_model(name, **(options | kw))
    )


def prefer(favourite):
    """A clock that finds `favourite`, if it is among the candidates, the fastest."""

    def clock(call, inputs):
        call(inputs[0])
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


def test_a_second_run_adds_and_renews(small, cache):
    run(prefer({"implementation": "cublas"}))
    before = json.loads(cache.read_text())["choices"]
    other = {"op": "linear", "shape": before[0]["shape"] | {"N": 5}, "choice": before[0]["choice"]}
    table = json.loads(cache.read_text())
    table["choices"].append(other)
    cache.write_text(json.dumps(table))
    run(prefer({"implementation": "triton", **HOPPER_CONFIGS[1]}))
    after = json.loads(cache.read_text())["choices"]
    assert len(after) == len(before) + 1 and other in after
    assert [r["choice"] for r in after if r["op"] == "linear"] != [
        r["choice"] for r in before if r["op"] == "linear"
    ]


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
    with pytest.raises(ValueError, match="--batch: 0, want 1 or more"):
        run(prefer({}), "--batch", "0")
    with pytest.raises(ValueError, match="--minutes: 0.0, want more than 0"):
        run(prefer({}), "--minutes", "0")
    with pytest.raises(RuntimeError, match="tuning measures on a CUDA device"):
        run(None)
    assert not cache.exists()


def test_the_command_without_a_gpu(capsys):
    assert tune.main(["--model", NAME]) == 2
    assert "needs" in (err := capsys.readouterr().err) or "measures on a CUDA device" in err
