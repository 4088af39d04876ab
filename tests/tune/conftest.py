"""A simulated chip with a table of its own, and a small model."""

import pytest
from modelling import TINY
from tuning import CHIP, HOPPER_CONFIGS, LINEAR

import deit_fast
from deit_fast.bench import timing
from deit_fast.kernels import _chips, _tuned
from deit_fast.tune import command


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path))
    _tuned.forget()
    with _chips.simulate_device(CHIP):
        yield tmp_path / "tuned" / "h9000.json"
    _tuned.forget()


@pytest.fixture
def small(monkeypatch):
    """Everything of the tiny model, and one set of inputs: a made-up clock has no cache."""
    monkeypatch.setattr(timing, "rotation", lambda make, nbytes, device: [make()])
    few = [HOPPER_CONFIGS[i] for i in (0, 1, 2, 8)]  # the rule's and one more: interpreted, all
    monkeypatch.setattr(LINEAR, "HOPPER_CONFIGS", few)  # of them would take minutes
    options = TINY | {"embed_dim": 64}
    monkeypatch.setattr(
        command, "create_model", lambda name, **kw: deit_fast.create_model(name, **(options | kw))
    )
