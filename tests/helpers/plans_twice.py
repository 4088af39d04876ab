"""A pytest plugin: every planned call runs a second time, as the plan that the first one made.

    DEIT_FAST_PLANS=1 python -m pytest -p plans_twice tests/layers

The tests then see what the plans compute, in Triton's interpreter: outputs and gradients. The
summary says how many calls ran as plans; where none did, the run fails.
"""

import pytest
import torch
from torch import Tensor

from deit_fast.layers._plans import decorator

_record = decorator.recorded_call
replayed = [0]


def twice(method, module, args, planned, without):
    """The result of the plan; the method's own where there is none."""
    random = torch.get_rng_state()
    result = _record(method, module, args, planned, without)
    flat = result if isinstance(result, tuple) else (result,)
    ends = [t for t in flat if isinstance(t, Tensor) and t.requires_grad]
    if ends and torch.is_grad_enabled():
        inputs = [t for t in (*args, *module.parameters()) if isinstance(t, Tensor)]
        wanted = [t for t in inputs if t.requires_grad]
        upstream = [torch.ones_like(t) for t in ends]
        if wanted:
            torch.autograd.grad(ends, wanted, upstream, retain_graph=True, allow_unused=True)
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    again = planned(*args)
    if again is None or again is NotImplemented:
        torch.set_rng_state(after)
        return result
    replayed[0] += 1
    return again


decorator.recorded_call = twice
decorator.at_once = True


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker of pytest-xdist is done: its calls count as well."""
    replayed[0] += getattr(node, "workeroutput", {}).get("replayed", 0)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fails where tests passed and no call ran as a plan."""
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:
        worker["replayed"] = replayed[0]
    elif session.exitstatus == pytest.ExitCode.OK and not replayed[0]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{replayed[0]} calls ran as plans")
