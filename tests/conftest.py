"""Without a CUDA device the kernels run in Triton's interpreter, which must be chosen before the
first kernel is decorated."""

import os
import tempfile

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("DEIT_FAST_BACKEND", None)
os.environ["DEIT_FAST_CACHE"] = tempfile.mkdtemp()  # no tuned table of this machine's user
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers that share cores wait for each other
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # and so do the processes that tests start
torch.backends.cudnn.allow_tf32 = False  # references in fp32 mean fp32


# not before the interpreter is chosen
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_convert = interpreter._convert_float


def _convert_float(data, source, target, rounding):
    """The interpreter's conversion to e4m3 loses the carry into the exponent (127 becomes 64),
    subnormal numbers and NaN. PyTorch's is right, and saturates no more than the interpreter's."""
    if tl.float8e4nv not in (source, target):
        return _convert(data, source, target, rounding)
    data = torch.from_numpy(np.array(data))
    data = data.view(torch.float8_e4m3fn) if source == tl.float8e4nv else data
    if target == tl.float8e4nv:
        return data.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    data = data.to({tl.float32: torch.float32, tl.float16: torch.float16}[target]).numpy()
    return data.view(f"uint{8 * data.itemsize}")


interpreter._convert_float = _convert_float


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: shows what the interpreter cannot")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)
