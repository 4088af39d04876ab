"""Compilation ahead of the steps: every kernel that they will launch, in parallel, without a GPU.

A driver that only compiles takes the place of CUDA's in these processes, and every launch becomes a
compilation for the chip. Batches are small and the chip has as many SMs fewer, so that the rules
choose the tiles of large batches; what a kernel is specialised on (which sizes and addresses 16
divides, what is 1, what is left out) is as in the steps, whose launches then find their kernels in
Triton's cache. Whatever is missed, a step compiles itself.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import deit_fast
from benchmarks.operations import EIGHT_BITS, NO_BACKWARD, OPS, both_ways, cast, operations
from deit_fast import tune
from deit_fast.kernels import _runtime, _tuned
from deit_fast.kernels.cases import deit_cases

BATCH, SMS, ODD = 8, 4, 3  # 256 images on 132 SMs are about 8 on 4
BF16, FP16 = torch.bfloat16, torch.float16
NETWORKS = {
    "B": "deit_base_distilled", "S": "deit_small_distilled", "Ti": "deit_tiny_distilled",
}  # fmt: skip
RELATIVES = {"cait_s24_224": {"depth": 1}, "tiny_vit_21m_224": {}}


class _Driver:
    """What Triton asks while it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(capability: tuple[int, int]) -> None:
    """From now on every launch of this process is a compilation for that compute capability."""
    triton.runtime.driver.set_active(_Driver(capability))
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compiled


def jobs(steps: list[str], chip: _runtime.Chip, small: bool) -> list[tuple[str, Callable]]:
    """(name, function) of what the steps launch, in the order of need; each compiles little."""
    networks = ["Ti"] if small else list(NETWORKS)
    found = []
    if "smoke" in steps:
        found += _operations(networks, chip)
    if {"agreement", "throughput", "latency"} & set(steps):
        found += [(f"model {n}", lambda n=n: _inference(NETWORKS[n], {"depth": 2}))
                  for n in networks]  # fmt: skip
    if {"agreement", "training"} & set(steps):
        found += [(f"training {n}", lambda n=n: _training(NETWORKS[n])) for n in networks]
    if "race" in steps:
        found += _races(networks, chip)
    if "relatives" in steps and not small:
        found += [(f"model {n}", lambda n=n, o=o: _inference(n, o)) for n, o in RELATIVES.items()]
    return found


def _operations(networks, chip):
    for backward in (False, True):
        for op in OPS:
            if backward and op in NO_BACKWARD:
                continue
            for network in networks:
                dtypes = (BF16,) if op in EIGHT_BITS or network != "B" else (BF16, FP16)
                for dtype in dtypes:
                    yield (
                        f"{op} {network} {str(dtype)[6:]}" + " backward" * backward,
                        lambda op=op, n=network, d=dtype, b=backward: _operation(op, n, d, b, chip),
                    )  # fmt: skip


def _operation(op, network, dtype, backward, chip):
    for batch in (BATCH, ODD) if network == "B" and dtype == BF16 else (BATCH,):
        for label, case in deit_cases(op, network, batch).items():
            if label.startswith("fp8") and chip.capability < (8, 9):
                continue
            for operation in operations(op):
                inputs = cast(operation.inputs(**case, device="cpu"), dtype)
                with torch.no_grad():
                    results = operation.call(**inputs)
                    if backward:
                        results = results if isinstance(results, tuple) else (results,)
                        upstream = {f"upstream_{i}": y for i, y in enumerate(results)}
                        both_ways(operation.call)(**inputs, **upstream)


def _inference(name, options):
    model = deit_fast.create_model(name, **options).bfloat16().eval()
    batch = 2 if name.startswith("tiny_vit") else BATCH
    with torch.inference_mode():
        model(torch.randn(batch, 3, 224, 224).bfloat16())
        if hasattr(model, "dist_token"):
            model(torch.zeros(batch, 224, 224, 3, dtype=torch.uint8))
            every = _runtime.Chip(*_runtime.chip(torch.device("cpu"))[:2], 132)
            with _runtime.pretend(every):  # latency's tiles are those of few rows
                for batch in (1, 8, 32):
                    model(torch.randn(batch, 3, 224, 224).bfloat16())


def _training(name):
    model = deit_fast.create_model(name, depth=2).train()
    with torch.autocast("cpu", BF16):
        logits = model(torch.randn(BATCH, 3, 224, 224))
    logits.float().sum().backward()


def _races(networks, chip):
    for network in networks:
        with torch.device("meta"):
            model = deit_fast.create_model(NETWORKS[network], depth=2)
        made: dict = {}  # of the last task, in each process
        for task in tune.tasks(model, BATCH, BF16, chip, training=True):
            for candidate in task.candidates:
                if dict(candidate)["implementation"] in ("triton", "fused"):
                    yield f"race {task}", lambda t=task, c=candidate, m=made: _candidate(t, c, m)


def _candidate(task, candidate, made):
    with torch.no_grad(), _tuned.disabled(), _tuned.forced(task.op, dict(candidate)):
        if task not in made:
            made.clear()
            made[task] = task.make(torch.device("cpu"))
        task.call(**made[task])


def run(steps: list[str], chip: _runtime.Chip, small: bool, processes: int) -> int:
    """Compile it all by so many processes, forked from this one; returns how many jobs failed. One
    that fails is named in the log, and its kernels are the steps' to compile."""
    few = chip._replace(processors=SMS)
    compile_only(chip.capability)
    with _runtime.pretend(few):
        todo = jobs(steps, few, small)
        taken, failed = multiprocessing.Value("i", 0), multiprocessing.Value("i", 0)
        children = [_fork(todo, taken, failed) for _ in range(min(processes, len(todo)))]
        for child in children:
            os.waitpid(child, 0)
    print(f"[warm-up] {len(todo)} jobs, {failed.value} failed", flush=True)
    return failed.value


def _fork(todo, taken, failed):
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        while True:
            with taken.get_lock():
                i, taken.value = taken.value, taken.value + 1
            if i >= len(todo):
                break
            name, job = todo[i]
            try:
                job()
            except Exception:
                print(f"[warm-up] {name} failed", flush=True)
                traceback.print_exc()
                with failed.get_lock():
                    failed.value += 1
    finally:
        os._exit(0)
