"""What launch plans give the driver, compared with what Triton's launcher gives it.

    python -m stand_in_cuda.plan_launches 9.0 models operations  (on tests/helpers)

Each piece runs without plans, is recorded, and runs as a plan, on new inputs every time. All that
the driver is given must be the same: function, grid, block, attributes, shared memory, stream and
the bytes of every parameter. A pointer is compared as a piece of memory, its size and an offset,
a tensor map as what it was encoded of. Prints as JSON what differs, and the kernels compared.
"""

import argparse
import copy
import ctypes
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import triton
from checking import seed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

import deit_fast
import stand_in_cuda
from benchmarks.operations import (
    NO_BACKWARD,
    NOT_TRAINED,
    OPS,
    QUANTIZED,
    cast,
    operations,
    tensors,
)
from deit_fast.kernels import _plan_library
from deit_fast.kernels.cases import deit_cases
from deit_fast.layers import _plans
from deit_fast.layers._plans import decorator

from . import made_up
from .exercise import BATCH, BF16, FP16, FP32, MODELS, SMS

# a bit that plans clear in maps of small tensors, and Triton from 3.7 on
CLEARED = " cleared 0x200000"
CLEARS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
FAMILIES = ("deit", "deit3", "heads of 80")  # whose layers have plans
# kernels that no shape of DeiT's gets by itself
ASKED = {"layer_norm_linear": "fold", "layer_norm_mlp": "fused"}


class Memory:
    """memory.cpp, from now on the memory of this process's CPU tensors."""

    def __init__(self, folder: Path | None):
        source = stand_in_cuda.HERE / "memory.cpp"
        folder = folder or stand_in_cuda.kept(source, torch.__version__)
        at = Path(torch.__file__).parent
        options = [f"-I{at / 'include'}", f"-L{at / 'lib'}", "-lc10", "-std=c++20"]
        compiler = os.environ.get("CXX") or "c++"
        path = stand_in_cuda.compiled(source, folder / "memory.so", compiler, *options)
        self.library = ctypes.CDLL(str(path))
        self.library.memory_find.restype = self.library.memory_blocks.restype = ctypes.c_long
        self.where = self.library.memory_where
        self.library.memory_install()

    def blocks(self) -> int:
        """How many there were so far."""
        return self.library.memory_blocks()

    def of(self, tensor: Tensor) -> int:
        """The number of the block that a tensor lies in."""
        return self.library.memory_find(ctypes.c_uint64(tensor.data_ptr()))


class Compared:
    """Compares pieces; what differs or raises is kept, and the others go on."""

    def __init__(self, gpu: stand_in_cuda.StandIn, memory: Memory):
        self.gpu, self.memory = gpu, memory
        self.differences: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.kernels: set[str] = set()

    def piece(
        self, name: str, module: nn.Module, inputs: list[Tensor], upstream: bool = False,
        around: Callable = nullcontext, partly: bool = False,
    ) -> None:  # fmt: skip
        """Compare the launches of `module(*inputs)`.

        Args:
            name: of the piece.
            module: with planned methods.
            inputs: its arguments; where they require gradients, they get them.
            upstream: whether backward runs as well.
            around: makes the context of a call.
            partly: whether some of its methods have no plan: PyTorch's operators serve in fp32.
        """
        try:
            with _plans.in_python():
                for _ in range(2):  # the first one fills caches, and is not looked at
                    expected = self.launches(module, inputs, upstream, around)
            recorded = self.launches(module, inputs, upstream, around)
            replayed = [self.launches(module, inputs, upstream, around) for _ in range(2)]
        except Exception as error:
            traceback.print_exc()
            self.differences[name] = f"{type(error).__name__}: {error}"[:400]
            return
        found = launches_of_plans(module)
        reasons = {r for part in module.modules() for r in _plans.why_not(part).values()}
        if not expected:
            return  # PyTorch's
        if (reasons and not partly) or not found:
            self.differences[name] = f"no plan: {sorted(reasons)}"
            return
        for label, launches in (
            ("recorded", recorded),
            ("first", replayed[0]),
            ("second", replayed[1]),
        ):
            difference = first_difference(expected, launches)
            if difference:
                self.differences[name] = f"{label} {difference}"
                return
        self.counts[name] = found
        self.kernels |= {text.partition(" ")[0] for text in expected}
        print(f"{name}: {len(expected)} launches, {found} in plans", file=sys.stderr)

    def launches(self, module, inputs, upstream, around) -> list[str]:
        """What one call of it launches, on inputs of its own."""
        given = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        names = {self.memory.of(t): f"input {i}" for i, t in enumerate(given)}
        before = self.memory.blocks()
        seed(1)
        with around():
            self.gpu.forget()
            results = [t for t in tensors(module(*given)) if t is not None]
            if upstream:
                wanted = [t for t in (*given, *module.parameters()) if t.requires_grad]
                ends = [t for t in results if t.requires_grad]
                grads = [torch.randn_like(t) for t in ends]
                names |= {self.memory.of(t): f"upstream {i}" for i, t in enumerate(grads)}
                torch.autograd.grad(ends, wanted, grads, allow_unused=True)
        texts = self.gpu.texts()

        def name(found):
            block = int(found[1])
            if block < before:
                return f"{names.get(block, f'held {block}')} +"
            return f"{names.setdefault(block, f'made {len(names)}')} +"

        texts = [re.sub(r"memory (\d+) \+", name, text) for text in texts]
        return texts if CLEARS else [text.replace(CLEARED, "") for text in texts]

    def models(self) -> None:
        """Whole models: inference, and training in each precision; quantized formats."""
        for family in FAMILIES:
            timm_name, options = MODELS[family]
            model = deit_fast.create_model(timm_name, **options, drop_path_rate=0.1)
            size = model.patch_embed.img_size[0]
            images = torch.randn(BATCH, 3, size, size)
            for dtype in (BF16, FP16, FP32) if family == "deit" else (BF16,):
                self.model(f"{family} {str(dtype)[6:]}", model, images, dtype)
            for format in ["int8"] + ["fp8"] * (self.gpu.chip.capability >= (8, 9)):
                quantized = copy.deepcopy(model).bfloat16().eval()
                deit_fast.quantize(quantized, format, attention=format == "fp8")
                name = f"{family} {format}"
                self.piece(name, quantized, [images.bfloat16()], around=torch.inference_mode)

    def model(self, name: str, model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
        fp32 = dtype == FP32
        cast, x = copy.deepcopy(model).to(dtype), images.to(dtype)
        self.piece(name, cast.eval(), [x], around=torch.inference_mode, partly=fp32)
        self.piece(f"{name}, no_grad", cast, [x], around=torch.no_grad, partly=fp32)
        self.piece(f"{name}, training", cast.train(), [x], upstream=True, partly=fp32)
        if not fp32:
            half = partial(torch.autocast, "cpu", dtype)
            model = copy.deepcopy(model).train()
            self.piece(f"{name}, autocast", model, [images], upstream=True, around=half)

    def operations(self) -> None:
        """Every public operation, as a module with a planned method; backward as well."""
        fp8 = self.gpu.chip.capability >= (8, 9)
        for op in OPS:
            dtypes = (BF16,) if op in QUANTIZED else (BF16, FP32)
            for label, case in deit_cases(op, "Ti", BATCH).items():
                if label.startswith("fp8") and not fp8:
                    continue
                for dtype in dtypes:
                    for operation in operations(op):
                        with torch.no_grad():
                            inputs = cast(operation.inputs(**case, device="cpu"), dtype)
                        name = f"{operation.name} {label} {str(dtype)[6:]}"
                        backward = op not in NO_BACKWARD
                        if op in ASKED and dtype is BF16:
                            call = partial(operation.call, implementation=ASKED[op])
                            self.operation(f"{name}, {ASKED[op]}", call, inputs)
                        self.operation(name, operation.call, inputs, backward, dtype is FP32)

    def operation(self, name, call: Callable, inputs: dict, backward=False, fp32=False) -> None:
        """One, forward without gradients, and forward with backward."""
        module, given = Operation.of(call, inputs)
        self.piece(name, module, given, around=torch.no_grad, partly=fp32)
        if backward:
            trained = module.trained()
            given = [t.requires_grad_(wanted) for t, wanted in zip(given, trained, strict=True)]
            self.piece(f"{name}, backward", Operation(*module.parts), given, True, partly=fp32)

    def made_up(self) -> None:
        """Kernels that take what none of ours takes."""
        for name, call, inputs in made_up.calls(self.gpu.chip.capability):
            self.operation(name, call, inputs)


class Operation(nn.Module):
    """A function of tensors and other arguments as a planned method.

    Args:
        call: the function.
        leaves: its arguments, flattened; of a tensor its block's number and its view of it.
        spec: how they were flattened.
        names: of the argument that each leaf is of.
    """

    __module__ = "deit_fast"  # a module of ours, as a plan needs

    def __init__(self, call, leaves, spec, names):
        super().__init__()
        self.parts = call, leaves, spec, names

    @classmethod
    def of(cls, call: Callable, inputs: dict) -> tuple["Operation", list[Tensor]]:
        """The module, and its arguments: the memory that the function's arguments are views of."""
        bases: list[Tensor] = []
        leaves, names = [], []
        for name, argument in inputs.items():
            flat = tree_flatten(argument)[0]
            names += [name] * len(flat)
        flat, spec = tree_flatten(inputs)
        for leaf in flat:
            if not isinstance(leaf, Tensor):
                leaves.append(leaf)
                continue
            base = leaf if leaf._base is None else leaf._base
            place = next((i for i, one in enumerate(bases) if one is base), len(bases))
            bases += [base] * (place == len(bases))
            view = () if base is leaf else (leaf.shape, leaf.stride(), leaf.storage_offset())
            leaves.append(_Leaf((place, view, leaf.is_floating_point())))
        return cls(call, leaves, spec, names), bases

    def trained(self) -> list[bool]:
        """Whether each of its arguments gets a gradient."""
        _, leaves, _, names = self.parts
        found: dict[int, bool] = {}
        for name, leaf in zip(names, leaves, strict=True):
            if isinstance(leaf, _Leaf):
                found[leaf[0]] = leaf[2] and name not in NOT_TRAINED
        return [found[i] for i in range(len(found))]

    @_plans.planned()
    def forward(self, *bases):
        call, leaves, spec, _ = self.parts
        arguments = []
        for leaf in leaves:
            if isinstance(leaf, _Leaf):
                base, view, _ = leaf
                leaf = bases[base].as_strided(*view) if view else bases[base]
            arguments.append(leaf)
        results = tensors(call(**tree_unflatten(arguments, spec)))
        given = {t.untyped_storage()._cdata for t in bases}  # a scale may be an argument
        results = [t for t in results if t.untyped_storage()._cdata not in given]
        return results[0] if len(results) == 1 else tuple(results)


class _Leaf(tuple):
    """Which of the arguments a tensor lies in, its view of it, and whether it is of floats."""


def launches_of_plans(module: nn.Module) -> int:
    """How many launches the plans of a module have."""
    return sum(
        pair.forward.launches + (pair.backward.launches if pair.backward else 0)
        for part in module.modules()
        for method in part.__dict__.get("_plans", {}).values()
        for pair in method.pairs
    )


def first_difference(expected: list[str], found: list[str]) -> str:
    """The first line in which they differ, for people; "": none."""
    for number, (a, b) in enumerate(zip(expected, found, strict=False)):
        pairs = zip(a.splitlines(), b.splitlines(), strict=False)
        name = a.partition(" ")[0]
        for one, other in pairs:
            if one != other:
                return f"launch {number}, {name}: expected {one}, got {other}"
        if a != b:
            return f"launch {number}, {name}: expected {len(a)} characters, got {len(b)}"
    if len(expected) != len(found):
        return f"call: expected {len(expected)} launches, got {len(found)}"
    freed = [text for text in found if "freed" in text]
    return f"call: freed memory in {freed[0]}" if freed else ""


GROUPS = ("models", "operations", "made_up")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stand_in_cuda.plan_launches", description=__doc__)
    parser.add_argument("capability", help="such as 9.0")
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--library", type=Path, help="folder of the stand-in libraries")
    args = parser.parse_args(argv)
    major, minor = map(int, args.capability.split("."))
    gpu = stand_in_cuda.install((major, minor), args.library, sms=SMS)
    memory = Memory(args.library)
    gpu.keep(memory.where)
    _plan_library.wait()
    decorator.at_once = True
    compared = Compared(gpu, memory)
    with sdpa_kernel(SDPBackend.MATH):  # in fp32: a plan can repeat its operators
        for group in args.groups:
            getattr(compared, group)()
    print(json.dumps({
        "differences": compared.differences, "reasons": gpu.reasons(), "counts": compared.counts,
        "kernels": sorted(compared.kernels), "library": _plan_library.status(),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
