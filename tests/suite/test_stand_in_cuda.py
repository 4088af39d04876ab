"""Everything is specialised, compiled and launched for chips that are not here; nothing runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import selection

from benchmarks.lease import bare

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
PYTHON = os.environ.get("LEASE_PYTHON", sys.executable)  # of another environment


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Runs Python on a copy of the package; nothing need be installed."""
    selection.compiler()
    folder = tmp_path_factory.mktemp("path")
    bare.copy(folder)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests" / "helpers")))
    env = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "triton")}
    env.pop("TRITON_INTERPRET", None)

    def start(*command):
        return subprocess.run(
            [PYTHON, *map(str, command)], env=env, cwd=folder, capture_output=True, text=True
        )

    return start


def exercised(started, library, capability, *groups):
    """What it found: nothing raised, and nothing was asked that the chip refuses."""
    done = started("-m", "stand_in_cuda.exercise", capability, *groups, "--library", library)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == {} and found["reasons"] == []
    assert all(found["counts"].values()), [n for n, c in found["counts"].items() if not c]
    assert found["least_grid"] >= 1 and found["shared"] <= found["limit"]
    assert found["registers"] <= 65536
    tensor_maps = tuple(map(int, capability.split("."))) >= (9, 0)
    assert tensor_maps or not found["maps"]
    return found


@pytest.mark.parametrize("capability", ["9.0", "8.0"])
def test_every_operation_is_launched(capability, started, tmp_path):
    """Forward and backward, in bf16, fp8 and int8, at the tiles of large batches."""
    found = exercised(started, tmp_path, capability, "operations", "--quick")
    assert bool(found["maps"]) == (capability == "9.0")
    wanted = {"_linear_kernel", "_attention_kernel", "_layer_norm_kernel", "_classifier_kernel"}
    wanted |= {"_patch_embed_kernel", "_quantized_linear_kernel", "_attention_backward_kernel"}
    wanted |= {"_talking_heads_dkv_kernel", "_window_attention_kernel", "_depthwise_conv_kernel"}
    assert wanted <= set(found["kernels"])


def test_every_model(started, tmp_path):
    """Each family in inference and training, bf16, autocast, fp8, int8."""
    found = exercised(started, tmp_path, "9.0", "models", "--quick")
    assert {"_window_attention_kernel", "_talking_heads_kernel"} <= set(found["kernels"])


@pytest.mark.skipif("LEASE_PYTHON" not in os.environ, reason="LEASE_PYTHON asks for it: minutes")
def test_every_configuration(started, tmp_path):
    """All that a tuner measures."""
    found = exercised(started, tmp_path, "9.0", "tune", "--quick")
    assert len(found["counts"]) > 150


@pytest.mark.skipif("STAND_IN" not in os.environ, reason="STAND_IN lists chips, 8.6 12.0: minutes")
def test_other_chips(started, tmp_path):
    """Everything, in every dtype of theirs."""
    for capability in os.environ["STAND_IN"].split():
        exercised(started, tmp_path, capability, "operations", "models", "tune")


def test_another_batch_compiles_nothing_new(started, tmp_path):
    """If 16 divides its rows as the first one's; where it does not, every row count's kernels are
    specialised anew, once."""
    found = exercised(started, tmp_path, "9.0", "again")
    first, other, repeated, odd = found["loaded"]
    assert first > 5 and other == repeated == 0 and odd > 0


REFUSED = """
import ctypes, sys
import torch, triton, triton.language as tl
import stand_in_cuda
from pathlib import Path
gpu = stand_in_cuda.install((9, 0), Path(sys.argv[1]))
library = gpu.library

def encode(address=1 << 20, dim=(512, 256), stride=1024, box=(64, 64), swizzle=3):
    map = (ctypes.c_char * 192)()
    start = ctypes.addressof(map) + -ctypes.addressof(map) % 64
    sizes = (ctypes.c_uint64 * 2)(*dim)
    strides = (ctypes.c_uint64 * 2)(stride, stride * dim[1])
    boxes, steps = (ctypes.c_uint32 * 2)(*box), (ctypes.c_uint32 * 2)(1, 1)
    return library.cuTensorMapEncodeTiled(
        ctypes.c_void_p(start), 9, 2, ctypes.c_void_p(address), sizes, strides, boxes, steps, 0,
        swizzle, 0, 0)

assert encode() == 0 and gpu.reasons() == [] and gpu.maps() == 1
for change in ({"address": (1 << 20) + 8}, {"stride": 1000}, {"box": (64, 512)},
               {"box": (3, 64)}, {"dim": (0, 256)}, {"box": (128, 64)}):
    before = len(gpu.reasons())
    assert encode(**change) != 0, change
    assert len(gpu.reasons()) == before + 1, change

@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), 1.0)

x = torch.zeros(1024)
gpu.forget()
kernel[(3,)](x, 1024)
(one,) = gpu.launches()
assert one.name == "kernel" and one.grid == (3, 1, 1) and one.threads == 128
assert one.registers > 0 and gpu.loads() == 1 and float(x.sum()) == 0.0
compiled = kernel.warmup(x, 1024, grid=(1,))
for grid, reason in (((1, 70000, 1), "a grid of"),):
    try:
        kernel[grid](x, 1024)
    except RuntimeError as error:
        assert "Triton Error [CUDA]: invalid argument" in str(error)
    assert reason in gpu.reasons()[-1], gpu.reasons()
library.cuModuleUnload(ctypes.c_void_p(compiled.module))
try:
    kernel[(1,)](x, 1024)
    raise SystemExit("a launch of an unloaded module")
except RuntimeError as error:
    assert "invalid resource handle" in str(error)
assert "not loaded" in gpu.reasons()[-1]
assert library.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), b"no cubin at all" * 20) != 0
print("refused")
"""


def test_what_a_chip_refuses_is_refused(started, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(REFUSED)
    done = started(script, tmp_path / "library")
    assert done.stdout.endswith("refused\n"), done.stdout + done.stderr


def test_it_is_no_interpreter(started):
    done = started("-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
                   "import stand_in_cuda; stand_in_cuda.install()")  # fmt: skip
    assert "TRITON_INTERPRET is set" in done.stderr
