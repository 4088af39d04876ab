"""Launch everything on a chip that is not there, and print as JSON what came of it.

    python -m stand_in_cuda.exercise 9.0 operations models tune  (on tests/helpers)

Batches are small and the chip has few SMs, so that the rules choose the tiles of large batches.
"""

import argparse
import copy
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from checking import seed

import deit_fast
import stand_in_cuda
from benchmarks.operations import NO_BACKWARD, OPS, QUANTIZED, both_ways, cast, operations
from deit_fast import tune
from deit_fast.kernels import _chips, _tuned
from deit_fast.kernels.cases import deit_cases

BATCH, SMS = 8, 4
BATCHES = (48, 64, 48, 49)  # 16 divides all but the last; all fold LayerNorm, in the same tiles
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
MODELS = {
    "deit": ("deit_tiny_distilled", {"depth": 2}),
    "deit, wider": ("deit_small", {"depth": 2}),
    "vit": ("vit_small_patch16_224", {"depth": 2, "num_classes": 10}),
    "deit3": ("deit3_small_patch16_224", {"depth": 2}),
    "heads of 80": ("deit3_huge_patch14_224", {"depth": 2, "embed_dim": 160, "num_heads": 2}),
    "cait": ("cait_xxs24_224", {"depth": 2}),
    "cait, heads of 8": ("cait_s24_224", {"depth": 1}),
    "tiny_vit": ("tiny_vit_5m_224", {"num_classes": 10}),
}  # fmt: skip

QUICK = ("deit", "heads of 80", "cait", "tiny_vit")


class Exercise:
    """Runs named pieces; what one raises is kept, and the others go on."""

    def __init__(self, gpu: stand_in_cuda.StandIn):
        self.gpu, self.errors, self.counts = gpu, {}, {}

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        before, began = len(self.gpu.launches()), time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {error}"[:400]
        self.counts[name] = len(self.gpu.launches()) - before
        seconds = time.perf_counter() - began
        print(f"{name}: {self.counts[name]} launches, {seconds:.1f} s", file=sys.stderr)

    def operations(self, quick: bool) -> None:
        """Every public operation on DeiT's shapes, forward and backward."""
        fp8 = self.gpu.chip.capability >= (8, 9)
        for op in OPS:
            dtypes = (BF16,) if op in QUANTIZED else (BF16, FP16, FP32)
            for network in ("Ti",) if quick else ("Ti", "S"):
                for label, case in deit_cases(op, network, BATCH).items():
                    if label.startswith("fp8") and not fp8:
                        continue
                    for dtype in dtypes[: 1 if quick or network == "S" else 3]:
                        for operation in operations(op):
                            name = f"{operation.name} {network} {label} {str(dtype)[6:]}"
                            self._operation(name, operation, case, dtype, op not in NO_BACKWARD)

    def _operation(self, name, operation, case, dtype, backward):
        with self.piece(name), torch.no_grad():
            inputs = cast(operation.inputs(**case, device="cpu"), dtype)
            results = operation.call(**inputs)
        if not backward:
            return
        with self.piece(f"{name} backward"):
            results = results if isinstance(results, tuple) else (results,)
            upstream = {f"upstream_{i}": torch.randn_like(y) for i, y in enumerate(results)}
            both_ways(operation.call)(**inputs, **upstream)

    def models(self, quick: bool) -> None:
        """Every family: inference in half precision, training, autocast, quantized formats."""
        for name, (timm_name, options) in MODELS.items():
            if quick and name not in QUICK:
                continue
            seed(0)
            model = deit_fast.create_model(timm_name, **options)
            size = model.patch_embed.img_size if hasattr(model.patch_embed, "img_size") else (224,)
            images = torch.randn(2 if name == "tiny_vit" else BATCH, 3, size[0], size[0])
            for dtype in (BF16,) if quick else (BF16, FP16):
                half = copy.deepcopy(model).to(dtype)
                with self.piece(f"{name} {dtype}"), torch.inference_mode():
                    half.eval()(images.to(dtype))
                with self.piece(f"{name} {dtype}, training"):
                    half.train()(images.to(dtype)).float().sum().backward()
                with self.piece(f"{name} autocast {dtype}, training"):
                    whole = copy.deepcopy(model).train()
                    with torch.autocast("cpu", dtype):
                        logits = whole(images)
                    logits.float().sum().backward()
            if name in ("cait", "cait, heads of 8", "tiny_vit"):
                continue  # nothing of theirs is quantized
            formats = ["int8"] + ["fp8"] * (self.gpu.chip.capability >= (8, 9))
            for format in formats:
                with self.piece(f"{name} {format}"), torch.inference_mode():
                    quantized = copy.deepcopy(model).bfloat16().eval()
                    deit_fast.quantize(quantized, format, attention=format == "fp8")
                    quantized(images.bfloat16())
        self._bytes_and_few_images()

    def _bytes_and_few_images(self):
        model = deit_fast.deit_tiny_distilled(depth=2).bfloat16().eval()
        with self.piece("deit, bytes"), torch.inference_mode():
            model(torch.zeros(BATCH, 224, 224, 3, dtype=torch.uint8))
        one = _chips.Chip(*self.gpu.chip[:2], stand_in_cuda.CHIPS[self.gpu.chip.capability][0])
        with self.piece("deit, one image"), _chips.simulate_device(one), torch.inference_mode():
            model(torch.randn(1, 3, 224, 224).bfloat16())

    def tune(self, quick: bool) -> None:
        """Every configuration that the tuner may pick, forced."""
        chip = self.gpu.chip
        if chip.capability < (8, 0):
            return
        for format in (None, "int8", "fp8")[: 3 if chip.capability >= (8, 9) else 2]:
            for network in ("S",) if quick else ("Ti", "S"):
                name = {"Ti": "deit_tiny_distilled", "S": "deit_small_distilled"}[network]
                with torch.device("meta"):
                    model = deit_fast.create_model(name, depth=2)
                    if format is not None:
                        deit_fast.quantize(model, format)
                for task in tune.tasks(model, BATCH, BF16, chip, training=format is None):
                    self._task(task, format or "bf16")

    def _task(self, task, format):
        with torch.no_grad():
            inputs = task.make(torch.device("cpu"))
        for candidate in task.candidates:
            choice = dict(candidate)
            if choice["implementation"] not in ("triton", "fused"):
                continue
            label = ", ".join(f"{k} {v}" for k, v in candidate)
            with self.piece(f"{format} {task}: {label}"), torch.no_grad():
                with _tuned.disabled(), _tuned.forced(task.op, choice):
                    task.call(**inputs)

    def again(self, quick: bool) -> dict:
        """Kernels loaded by a first batch, by another one, and by one that 16 does not divide."""
        model = deit_fast.deit_tiny_distilled(depth=2).bfloat16().eval()
        loads = [self.gpu.loads()]
        with self.piece("three batches"), torch.inference_mode():
            for batch in BATCHES:
                model(torch.randn(batch, 3, 224, 224).bfloat16())
                loads.append(self.gpu.loads())
        return {"loaded": [b - a for a, b in zip(loads, loads[1:], strict=False)]}


GROUPS = ("operations", "models", "tune", "again")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stand_in_cuda.exercise", description=__doc__)
    parser.add_argument("capability", help="such as 9.0")
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--quick", action="store_true", help="fewer dtypes and networks")
    parser.add_argument("--library", type=Path, help="folder of the stand-in library")
    args = parser.parse_args(argv)
    major, minor = map(int, args.capability.split("."))
    gpu = stand_in_cuda.install((major, minor), args.library, sms=SMS)
    exercise, found = Exercise(gpu), {}
    for group in args.groups:
        found |= getattr(exercise, group)(args.quick) or {}
    launches = gpu.launches()
    print(json.dumps(found | {
        "errors": exercise.errors, "reasons": gpu.reasons(), "counts": exercise.counts,
        "launches": len(launches), "loads": gpu.loads(), "maps": gpu.maps(),
        "kernels": sorted({one.name for one in launches}),
        "shared": max((one.shared for one in launches), default=0), "limit": gpu.shared_limit,
        "registers": max((one.registers * one.threads for one in launches), default=0),
        "least_grid": min((min(one.grid) for one in launches), default=0),
        "spills": sorted({(one.name, one.spills) for one in launches if one.spills}),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
