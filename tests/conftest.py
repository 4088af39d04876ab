"""Without a CUDA device the kernels run in Triton's interpreter, which must be chosen before the
first kernel is decorated."""

import os
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # for the interpreter, before numpy is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("DEIT_FAST_BACKEND", None)
os.environ["DEIT_FAST_CACHE"] = cache = tempfile.mkdtemp()  # no tuned table of the user's
os.environ.setdefault("DEIT_FAST_PLANS", "0")  # which calls run as plans is not left to chance
plans = Path(tempfile.gettempdir(), "deit_fast_plans")  # their library is built once
plans.mkdir(exist_ok=True)
Path(cache, "plans").symlink_to(plans)
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers that share cores wait for each other
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # and so do the processes that tests start
torch.backends.cudnn.allow_tf32 = False  # references in fp32 mean fp32

import checking  # noqa: E402
import interpreting  # noqa: E402  (not before the interpreter is chosen)

from deit_fast.kernels import _chips, cases  # noqa: E402

pytest_plugins = ["tiers", "selection"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Kernels are interpreted for tests that ask for `device`, or are of a CPU alone. To the others
    this is a machine with a GPU: there a kernel takes no CPU tensor."""
    interpreted = os.environ.get("TRITON_INTERPRET")
    if not interpreted or "device" in item.fixturenames or item.get_closest_marker("cpu"):
        return (yield)
    with interpreting.refused(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chips, "INTERPRET", False)
        patch.delenv("TRITON_INTERPRET")
        return (yield)


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def draws_by_seed(monkeypatch):
    """What no test seeds, and what `deit_fast.kernels.cases` makes."""
    checking.seed(0)
    monkeypatch.setattr(cases, "SEED", checking.seeded(0))


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)
