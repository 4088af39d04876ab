"""Launch plans give the driver what Triton's launcher gives it: on a chip that is not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import selection

from benchmarks.lease import bare

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
PYTHON = os.environ.get("LEASE_PYTHON", sys.executable)  # of another environment
LAUNCHED = re.compile(r"_plans\.launch\(\s*(_\w+_kernel),")
# builds the library with more of the compiler's options, where the next process looks for it
BUILD = """
import subprocess, sys
from deit_fast.kernels import _plan_library
path = _plan_library.path_of_build()
path.parent.mkdir(parents=True, exist_ok=True)
subprocess.run(_plan_library.command(path, *sys.argv[1:]), check=True)
"""
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr",
              "-fno-omit-frame-pointer", "-g1", "-O1")  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Runs Python on a copy of the package; nothing need be installed."""
    selection.compiler()
    folder = tmp_path_factory.mktemp("path")
    bare.copy(folder)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests" / "helpers")))
    env = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "triton")}
    for name in ("TRITON_INTERPRET", "DEIT_FAST_PLANS"):
        env.pop(name, None)

    def start(*command, **more):
        return subprocess.run(
            [PYTHON, *map(str, command)], env=env | more, cwd=folder, capture_output=True, text=True
        )

    return start


def compared(started, capability, *groups, **env):
    """What was compared: no launch differs, and the chip refuses none."""
    done = started("-m", "stand_in_cuda.plan_launches", capability, *groups, **env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["library"].startswith("ready")
    assert found["differences"] == {} and found["reasons"] == []
    return found


def kernels():
    """Those that the package launches."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "kernels").rglob("*.py")))
    found = LAUNCHED.findall(sources)
    assert len(found) == sources.count("_plans.launch(")
    return set(found)


def test_plans_launch_what_triton_launches(started):
    """Every kernel, of operations and of whole models, and every kind of parameter and option."""
    found = compared(started, "9.0", "made_up", "operations", "models")
    assert kernels() <= set(found["kernels"]), kernels() - set(found["kernels"])
    assert len(found["counts"]) > 80


def test_plans_launch_what_triton_launches_without_tensor_maps(started):
    found = compared(started, "8.0", "made_up", "operations")
    assert {"_linear_kernel", "_attention_kernel"} <= set(found["kernels"])


def sanitized(started, folder):
    """The environment in which calls run the library with sanitizers."""
    compiler = os.environ.get("CXX") or "c++"
    names = [f"lib{name}.so" for name in ("asan", "ubsan")]
    ask = [[compiler, f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(one, capture_output=True, text=True).stdout.strip() for one in ask]
    if found == names:
        pytest.skip("tool: the C++ compiler has no sanitizers")
    env = {"DEIT_FAST_CACHE": str(folder)}
    done = started("-c", BUILD, *SANITIZERS, **env)
    assert done.returncode == 0, done.stderr
    return env | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


THREADS = """
import json, threading, time
import torch
import deit_fast
import stand_in_cuda
from deit_fast.kernels import _plan_library

gpu = stand_in_cuda.install((9, 0))
library = _plan_library.wait()
model = deit_fast.create_model("deit_tiny", depth=1).to(torch.bfloat16).eval()
batches = [torch.zeros(i + 1, 3, 224, 224, dtype=torch.bfloat16) for i in range(4)]
torch.set_num_threads(1)

def call(x):
    with torch.no_grad():
        return model(x)

for x in batches:
    for _ in range(3):
        call(x)
gpu.forget()
each = []
for x in batches:
    call(x)
    each.append(len(gpu.launches()) - sum(each))
gpu.forget()
runs, shapes = library.runs(), []
work = lambda x: shapes.extend(tuple(call(x).shape) for _ in range(25))
gpu.sleep(1000)
start = time.perf_counter()
work(batches[0])
alone = time.perf_counter() - start
threads = [threading.Thread(target=work, args=(x,)) for x in batches]
start = time.perf_counter()
for t in threads:
    t.start()
for t in threads:
    t.join()
print(json.dumps({
    "each": each, "launches": len(gpu.launches()), "runs": library.runs() - runs,
    "reasons": gpu.reasons(), "alone": alone, "together": time.perf_counter() - start,
    "shapes": sorted(set(shapes)), "calls": len(shapes),
}))
"""


def test_threads_launch_at_the_same_time(started):
    """Four threads, new to CUDA, one model: none waits for another's launches."""
    done = started("-W", "ignore", "-c", THREADS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["reasons"] == [] and found["runs"] == found["calls"] == 5 * 25
    assert found["shapes"] == [[i, 1000] for i in (1, 2, 3, 4)]
    assert found["launches"] == 25 * (found["each"][0] + sum(found["each"]))
    assert found["together"] < 2.5 * found["alone"]


def test_plans_access_no_memory_but_their_own(started, tmp_path):
    """Launches with every kind of parameter, under the compiler's sanitizers."""
    compared(started, "9.0", "made_up", **sanitized(started, tmp_path))
