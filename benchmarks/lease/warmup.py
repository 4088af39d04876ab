"""Compilation ahead of the steps: every kernel that they will launch, in parallel, without a GPU.

Every launch becomes a compilation for the chip (compile_only.py). The calls are the steps' own, at
their batches, on the CPU, but PyTorch's matmuls are left out. So each kernel is specialised as
it will be, and the steps find it in Triton's cache. Whatever is missed, a step compiles itself.
"""

import copy
import multiprocessing
import os
import traceback
from collections.abc import Callable

import torch
from triton.backends.nvidia import driver as nvidia

import deit_fast
from benchmarks.operations import NO_BACKWARD, OPS, both_ways, cast, operations
from benchmarks.table5 import DISTILLED
from deit_fast import tune
from deit_fast.kernels import _chips, _tuned
from deit_fast.kernels.cases import deit_cases
from deit_fast.layers import _plans

from . import agreement, kernels, models, sanitize, smoke
from .compile_only import NoMatmuls, compile_only

# configurations to tune are given, so a few rows do: 16 divides them as it does the real ones
TUNE_BATCH, TUNE_SMS = 16, 8
BF16, FP16 = torch.bfloat16, torch.float16
NETWORKS = {name: DISTILLED[name] for name in ("B", "S", "Ti")}
RELATIVES = {
    DISTILLED["B-384"]: {"depth": 2}, "vit_base_patch16_224": {"depth": 2},
    "cait_s24_224": {"depth": 1}, "tiny_vit_21m_224": {},
}  # fmt: skip
CPU = torch.device("cpu")


def jobs(steps: list[str], chip: _chips.Chip, small: bool) -> list[tuple[str, Callable]]:
    """(name, function) of what the steps launch, in the order of need; each compiles little."""
    networks = ["Ti"] if small else list(NETWORKS)
    steps, found = set(steps), [("Triton's driver", nvidia.CudaUtils)]  # C code, as the launchers
    if "smoke" in steps:
        found += _operations(networks, small)
    if {"agreement", "throughput", "latency", "quantized"} & steps:
        found += [(f"model {n}", lambda n=n: _inference(NETWORKS[n], small)) for n in networks]
    if {"agreement", "training"} & steps:
        found += [(f"training {n}", lambda n=n: _training(NETWORKS[n], small)) for n in networks]
    if "tune" in steps:
        found += [job for n in networks for job in _tuning(NETWORKS[n], chip)]
    if "quantized" in steps:
        found += [
            (f"{format} {n}", lambda n=n, f=format: _quantized(NETWORKS[n], f, small))
            for format in (["fp8"] * (chip.capability >= (8, 9)) + ["int8"])
            for n in networks[:2]
        ]  # fmt: skip
    if "relatives" in steps:
        relatives = {"tiny_vit_5m_224": {}} if small else RELATIVES
        found += [
            (f"model {n}", lambda n=n, o=o: _relative(n, o, small)) for n, o in relatives.items()
        ]
    if "tune-more" in steps and chip.capability >= (8, 9):
        found += _tuning(NETWORKS[networks[0]], chip, "fp8")
    if "kernels" in steps:
        found += [
            (f"kernels {op} {n}", lambda op=op, n=n: _timed(op, n, small))
            for n in networks
            for op in kernels.DEIT_OPS
        ]
    if "sanitizer" in steps:
        found += [(f"sanitizer {op}", lambda op=op: sanitize.launch(op, CPU)) for op in OPS]
    return found


def _operations(networks, small):
    for backward in (False, True):
        for op in OPS:
            if backward and op in NO_BACKWARD:
                continue
            for network in networks:
                yield (
                    f"{op} {network}" + smoke.BACKWARD * backward,
                    lambda op=op, n=network, b=backward: operation(op, n, b, small),
                )


def operation(op: str, network: str, backward: bool, small: bool) -> None:
    """Launch what the step "smoke" does of it."""
    for one in operations(op):
        for _, make, dtype in smoke.cases(one, op, network, backward, small, CPU):
            _called(one, make(CPU), dtype, backward)


@torch.no_grad()
def _called(one, inputs, dtype, backward):
    inputs = cast(inputs, dtype)
    results = one.call(**inputs)
    if backward:
        results = results if isinstance(results, tuple) else (results,)
        upstream = {f"upstream_{i}": y for i, y in enumerate(results)}
        both_ways(one.call)(**inputs, **upstream)


def _timed(op, network, small):
    for one in operations(op):
        for case in deit_cases(op, network, _batch(models.BATCH, small)).values():
            _called(one, one.inputs(**case, device=CPU), BF16, op not in NO_BACKWARD)


def _batch(batch, small):
    return min(batch, models.SMALL_BATCH) if small else batch


def _images(batch, dtype, size=224):
    return torch.empty(batch, 3, size, size, dtype=dtype)


def _inference(name, small):
    model = deit_fast.create_model(name, depth=2).eval()
    agrees = _batch(agreement.BATCH, small)
    with torch.inference_mode():
        copy.deepcopy(model).to(FP16)(_images(agrees, FP16))
        model.to(BF16)
        for batch in {_batch(b, small) for b in (models.BATCH, agrees, *models.LATENCY_BATCHES)}:
            model(_images(batch, BF16))
        model(torch.zeros(agrees, 224, 224, 3, dtype=torch.uint8))


def _relative(name, options, small):
    model = deit_fast.create_model(name, **options).to(BF16).eval()
    size = 384 if "384" in name else 224
    with torch.inference_mode():
        model(_images(_batch(models.BATCH, small), BF16, size))


def _quantized(name, format, small):
    model = deit_fast.create_model(name, depth=2).to(BF16).eval()
    for attention in (False, True)[: 1 + (format == "fp8")]:
        made = copy.deepcopy(model)
        deit_fast.quantize(made, format, attention=attention)
        with torch.inference_mode():
            made(_images(_batch(models.BATCH, small), BF16))


def _training(name, small):
    model = deit_fast.create_model(name, depth=2).train()
    for batch in {_batch(b, small) for b in (models.TRAIN_BATCH, agreement.BATCH)}:
        with torch.autocast("cpu", BF16):
            logits = model(_images(batch, torch.float32))
        logits.float().sum().backward()


def _tuning(name, chip, format=None):
    with torch.device("meta"):
        model = deit_fast.create_model(name, depth=2)
        if format is not None:
            deit_fast.quantize(model, format)
    made: dict = {}  # of the last task, in each process
    few = chip._replace(num_sms=TUNE_SMS)
    for task in tune.tasks(model, TUNE_BATCH, BF16, few, training=format is None):
        for candidate in task.candidates:
            if dict(candidate)["implementation"] != "torch":
                yield f"tune {task}", lambda t=task, c=candidate, m=made: _candidate(t, c, m)


def _candidate(task, candidate, made):
    with torch.no_grad(), _tuned.disabled(), _tuned.forced(task.op, dict(candidate)):
        if task not in made:
            made.clear()
            made[task] = task.make(CPU)
        task.call(**made[task])


def run(steps: list[str], chip: _chips.Chip, small: bool, processes: int) -> int:
    """Compile it all.

    Args:
        steps: Names of the steps that will run.
        chip: To compile for.
        small: Whether shapes are reduced.
        processes: How many are forked from this one.

    Returns:
        How many jobs failed. Each is named in the log, and its kernels are the steps' to compile.
    """
    compile_only(chip.capability)
    with _chips.simulate_device(chip):
        todo = jobs(steps, chip, small)
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
                with NoMatmuls(), _plans.in_python():
                    job()
            except Exception:
                print(f"[warm-up] {name} failed", flush=True)
                traceback.print_exc()
                with failed.get_lock():
                    failed.value += 1
    finally:
        os._exit(0)
