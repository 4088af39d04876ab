"""Writes down what a call does on the device, as the steps of a launch plan.

`Recorder` is a TorchDispatchMode: it sees PyTorch's operators below autograd and autocast, and
`_plans.launch` tells it of Triton's. Tensors are told apart by their memory: a tensor on memory
that was seen before is a view of it, whatever made it.

A plan that could differ from the next call is not made: `why_not` says why.
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _chips

aten = torch.ops.aten
_EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default,
          aten.new_empty_strided.default, aten.empty_like.default}  # fmt: skip
_UNKNOWN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_RANDOM = torch.Tag.nondeterministic_seeded
# A kernel's parameter by its type in Triton's signature, as the struct module writes it
_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B",
            "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}  # fmt: skip
_MAP_BYTES = 128

bodies: dict[Any, Callable[..., Any]] = {}  # of our operators: see `_dispatch.Op`


class Ref(NamedTuple):
    """A tensor as a view of a slot: sizes and strides in elements, the offset in bytes."""

    slot: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


class Step(NamedTuple):
    """A step: what it is, the slots that it reads, the slots that it makes, and its data."""

    kind: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    data: tuple


class Recorder(TorchDispatchMode):
    """A mode in which a function runs once.

    Args:
        inputs: the tensors that differ between calls; they become the first slots.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.why_not: str | None = None
        self.steps: list[Step] = []
        self.device = inputs[0].device
        self._inputs: set[int] = set()  # slots
        self._launches = False
        self.slots = 0
        self.backward_from: int | None = None
        self.upstream: list[int] = []  # slots of the gradients that backward starts from
        self.outputs: list[int] = []  # slots of what forward returned
        self.random: dict[int, Tensor] = {}  # slot -> random numbers
        # storage -> slot, its first byte, and what keeps the address from a second storage
        self._memory: dict[int, tuple[int, int, StorageWeakRef]] = {}
        self._own: list[Ref] = []  # each slot as a Ref
        self._views: dict[Ref, int] = {}
        for tensor in inputs:
            self.add_input(tensor)

    def add_input(self, tensor: Tensor) -> int:
        """A slot that is given to the plan."""
        if tensor.untyped_storage()._cdata in self._memory and tensor.numel():
            self.refuse("two of its tensors share memory")
        slot = self._new(tensor)
        self._inputs.add(slot)
        return slot

    def refuse(self, why: str) -> None:
        """No plan is made."""
        self.why_not = self.why_not or why

    def end_forward(self, result: object) -> Any:
        """The end of forward.

        Args:
            result: what it returned, a tensor or a tuple of tensors and None.

        Returns:
            The same with numbers of outputs in the place of tensors.
        """
        if isinstance(result, tuple):
            return tuple(None if one is None else self._output(one) for one in result)
        return self._output(result)

    def _output(self, tensor):
        if not isinstance(tensor, Tensor):
            return self.refuse(f"it returns a {type(tensor).__name__}")
        slot = self.slot_of(tensor)
        if self.why_not is None and self._base_of(slot) in self._inputs:
            self.refuse("it returns an argument or a parameter")
        self.outputs.append(slot)
        return len(self.outputs) - 1

    def start_backward(self, upstream: Sequence[Tensor]) -> None:
        """From here on backward is recorded; its inputs are the gradients of forward's results."""
        self._views.clear()
        self.backward_from = len(self.steps)
        self.upstream = [self.add_input(t) for t in upstream]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._launches or self.why_not is not None:
            return func(*args, **kwargs)
        body = bodies.get(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            with self:  # not `decompose`: in torch 2.11 that copies in a dropout that does nothing
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        made = func(*args, **kwargs)
        self._record(func, args, kwargs, made)
        return made

    # what was seen

    def _record(self, func, args, kwargs, made):
        results = () if made is None else made if isinstance(made, (tuple, list)) else (made,)
        if not all(isinstance(t, Tensor) for t in results):
            return self.refuse(f"{func} returns no tensor: the host needs its result")
        if func in _EMPTY:
            if made.device != self.device:
                return self.refuse(f"it makes a tensor on {made.device}")
            slot = self._new(made)
            self.steps.append(Step("alloc", (), (slot,), self._own[slot][1:4]))
            return None
        known = [self._is_known(t) for t in results]
        if known and all(known) and not func._schema.is_mutable:
            return None  # views
        if isinstance(made, list):
            return self.refuse(f"{func} returns a list")
        if any(tag in func.tags for tag in _UNKNOWN) or func._schema.name.startswith(
            "aten::_scaled"
        ):
            return self.refuse(f"{func} may differ in the next call")
        return self._call(func, args, kwargs, results, known)

    def _call(self, func, args, kwargs, results, known):
        arguments, reads = [], []

        def put(value):
            if not isinstance(value, Tensor):
                return value
            reads.append(self.slot_of(value))
            return (reads[-1],)

        for i, parameter in enumerate(func._schema.arguments):
            if i < len(args):
                value = args[i]
            else:
                value = kwargs.get(parameter.name, parameter.default_value)
            if isinstance(value, (list, tuple)):
                value = [put(one) for one in value]
            else:
                value = put(value)
            arguments.append(value)
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                slots = [one[0] for one in (value if isinstance(value, list) else [value]) if one]
                if any(self._base_of(slot) in self._inputs for slot in slots):
                    return self.refuse(f"{func} writes to an argument or a parameter")
        makes = tuple(-1 if seen else self._new(t) for t, seen in zip(results, known, strict=True))
        if _RANDOM in func.tags:
            if func is not aten.bernoulli_.float:
                return self.refuse(f"{func} draws random numbers")
            self.random[self._base_of(arguments[0][0])] = args[0]
        name = func._schema.name, func._schema.overload_name
        made = tuple(slot for slot in makes if slot >= 0)
        self.steps.append(Step("call", tuple(reads), made, (*name, arguments, list(makes))))
        return None

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict) -> None:
        """Launch a Triton kernel, with the arguments as `_plans.launch` got them."""
        self._launches = True  # Triton's interpreter calls operators of PyTorch's
        try:
            compiled = kernel[grid](*args, **meta)
        finally:
            self._launches = False
        if self.why_not is not None or math.prod(grid) == 0:
            return
        bound = dict(zip(kernel.arg_names, args, strict=False)) | meta
        if _chips.INTERPRET:
            self._interpreted(kernel, grid, args, meta)
            return
        metadata = compiled.metadata
        if metadata.global_scratch_size or getattr(metadata, "profile_scratch_size", 0):
            self.refuse(f"{compiled.name} asks for scratch memory")
            return
        packed = Parameters(self)
        maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
        for name, kind in compiled.src.signature.items():
            packed.add(kind, bound.get(name), maps)
        if self.why_not is not None:
            return
        packed.pointer(None)  # scratch memory, global and of the profiler
        packed.pointer(None)
        one = {
            "name": compiled.name, "function": compiled.function, "grid": (*grid, 1, 1)[:3],
            "threads": 32 * metadata.num_warps, "shared": metadata.shared,
            "cluster": metadata.num_ctas, "cooperative": metadata.launch_cooperative_grid,
            "dependent": metadata.launch_pdl, "parameters": bytes(packed.bytes),
            "offsets": packed.offsets, "pointers": packed.pointers, "maps": packed.maps,
            "compiled": compiled,
        }  # fmt: skip
        self.steps.append(Step("launch", tuple(packed.reads), (), (one,)))

    def _interpreted(self, kernel, grid, args, meta):
        places = [i for i, a in enumerate(args) if isinstance(_tensor_of(a), Tensor)]
        slots = tuple(self.slot_of(_tensor_of(args[i])) for i in places)
        blocks = {i: getattr(args[i], "block_shape", None) for i in places}
        constants = [None if i in blocks else a for i, a in enumerate(args)]

        def run(tensors):
            given = list(constants)
            for (i, block), tensor in zip(blocks.items(), tensors, strict=True):
                given[i] = tensor
                if block is not None:
                    given[i] = TensorDescriptor.from_tensor(tensor, block)
            kernel[grid](*given, **meta)

        self.steps.append(Step("interpreted", slots, (), (list(slots), run)))

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """The range of an operation, for profilers."""
        self.steps.append(Step("begin", (), (), (name,)))
        try:
            yield
        finally:
            self.steps.append(Step("end", (), (), ()))

    # tensors and slots

    def _new(self, tensor):
        slot, self.slots = self.slots, self.slots + 1
        size = tensor.element_size()
        start = tensor.storage_offset() * size
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = slot, start, StorageWeakRef(storage)
        own = Ref(slot, tuple(tensor.shape), tensor.stride(), tensor.dtype, 0)
        self._own.append(own)
        return slot

    def _is_known(self, tensor):
        return tensor.untyped_storage()._cdata in self._memory

    def ref(self, tensor: Tensor) -> Ref:
        """A tensor that is an argument of a step."""
        found = self._memory.get(tensor.untyped_storage()._cdata)
        if found is None:
            self.refuse("it reads a tensor that is neither an argument nor a parameter")
            return self._own[0]
        slot, start, _ = found
        offset = tensor.storage_offset() * tensor.element_size() - start
        return Ref(slot, tuple(tensor.shape), tensor.stride(), tensor.dtype, int(offset))

    def slot_of(self, tensor: Tensor) -> int:
        """The slot with this very tensor; a view of another slot gets one of its own."""
        ref = self.ref(tensor)
        if self.why_not is not None or ref == self._own[ref.slot]:
            return ref.slot
        slot = self._views.get(ref)
        if slot is None:
            slot, self.slots = self.slots, self.slots + 1
            self._own.append(ref)
            self._views[ref] = slot
            self.steps.append(Step("view", (ref.slot,), (slot,), ref))
        return slot

    def _base_of(self, slot):
        return self._own[slot].slot


class Parameters:
    """The parameters of a kernel, in memory as Triton's launcher hands them to the driver."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.bytes = bytearray()
        self.offsets: list[int] = []
        self.pointers: list[tuple[int, int, int]] = []  # place, slot, offset in bytes
        self.maps: list[dict] = []
        self.reads: list[int] = []

    def add(self, kind: Any, value: Any, maps: Any) -> None:
        """The parameters of one argument.

        Args:
            kind: its type in the signature.
            value: as it was given.
            maps: what the compiler says of each tensor descriptor, an iterator.
        """
        if isinstance(kind, tuple):
            for one, inner in zip(kind, value, strict=True):
                self.add(one, inner, maps)
        elif kind == "constexpr":
            pass
        elif kind[0] == "*":
            self.pointer(value)
        elif kind.startswith("tensordesc"):
            self._descriptor(value, next(maps, None))
        elif kind in ("fp16", "bf16"):
            self.recorder.refuse(f"a kernel takes a number of type {kind}")
        else:
            self.number(kind, value)

    def pointer(self, tensor: Tensor | None) -> None:
        """A pointer to a tensor, or a null pointer."""
        at = self._place(8, 8)
        if tensor is not None:
            ref = self.recorder.ref(tensor)
            self.pointers.append((at, ref.slot, ref.bytes))
            self.reads.append(ref.slot)

    def number(self, kind: str, value: float) -> None:
        """A scalar."""
        packed = struct.pack(_FORMATS[kind], value)
        at = self._place(len(packed), len(packed))
        self.bytes[at : at + len(packed)] = packed

    def _descriptor(self, descriptor, meta):
        plain = meta and not meta.get("fp4_padded") and not meta.get("is_im2col")
        if not plain or getattr(descriptor, "round_f32_to_tf32", False):
            self.recorder.refuse("a kernel takes a descriptor without a tensor map")
            return
        base, size = descriptor.base, meta["elem_size"]
        at = self._place(_MAP_BYTES, 64)
        ref = self.recorder.ref(base)
        self.reads.append(ref.slot)
        shape, strides = list(descriptor.shape), list(descriptor.strides)
        last = size * sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        self.maps.append({
            "at": at, "slot": ref.slot, "bytes": ref.bytes, "swizzle": meta["swizzle"],
            "type": _map_type(meta["elem_type"]), "nan": descriptor.padding == "nan",
            "sizes": shape[::-1], "strides": [size * s for s in strides[:-1][::-1]],
            "box": list(meta["block_size"])[::-1], "small": last + 1 < 128 * 1024,
        })  # fmt: skip
        for extent in shape:
            self.number("i32", extent)
        for stride in strides:
            self.number("i64", stride)

    def _place(self, size, alignment):
        self.bytes += bytes(-len(self.bytes) % alignment)
        at = len(self.bytes)
        self.offsets.append(at)
        self.bytes += bytes(size)
        return at


def _tensor_of(argument):
    return argument.base if isinstance(argument, TensorDescriptor) else argument


def _map_type(element):
    """The driver's number of an element type: Triton's own numbers are the device's."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    return TMA_DTYPE_DEVICE_TO_HOST[element]
