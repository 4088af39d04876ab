"""Launch plans in tests: `plans` is a fixture with the library, and says what ran as a plan.

Their steps run in Triton's interpreter where there is no GPU.
"""

from contextlib import contextmanager

import pytest
import selection
import torch
from modelling import images, tiny_pair

from deit_fast.kernels import _plan_library, _plans

_libraries = []  # one, once it was built


class Plans:
    """How many kernels Python launched; plans launch theirs in C++."""

    launched = 0

    @contextmanager
    def expected(self, plan: bool):
        """That plans alone run in this context, or that Python runs."""
        runs, launched = _libraries[0].runs(), self.launched
        yield
        runs, launched = _libraries[0].runs() - runs, self.launched - launched
        got = f"{runs} plans ran, and Python launched {launched} kernels"
        assert (runs > 0 and launched == 0) == plan, got

    def called(self, call, plan=True):
        """What `call()` returns, which ran as a plan, or in Python."""
        with self.expected(plan):
            return call()

    def warm(self, call):
        """After this, `call()` is a plan."""
        for _ in range(2):
            self.called(call, plan=False)
        return self.called(call)


@pytest.fixture
def plans(monkeypatch, device):
    selection.compiler()
    if not _libraries:
        _libraries.append(_plan_library.load(_plan_library.build()))
    monkeypatch.setattr(_plan_library, "WANTED", "1")
    monkeypatch.setattr(_plan_library, "loaded", _libraries[0])
    found, launch = Plans(), _plans.launch

    def counted(*args, **kwargs):
        found.launched += 1
        launch(*args, **kwargs)

    monkeypatch.setattr(_plans, "launch", counted)
    yield found


def small(device, dtype=torch.bfloat16, **kwargs):
    """A model with one block, and a batch."""
    model = tiny_pair("triton", **{"depth": 1, "img_size": 32} | kwargs)[1].to(device, dtype)
    return model, images(model).to(device, dtype)


def stepped(model, x):
    """The outputs of a training step and every gradient."""
    outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    model.zero_grad(set_to_none=True)
    torch.stack([t.float() for t in outputs]).square().sum().backward()
    return [t.detach() for t in outputs] + [p.grad for p in model.parameters()]


def assert_equal(got, expected):
    """The same bits."""
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))
