"""InferenceEngine: images in, logits out, with as little as possible in between.

On a GPU a forward pass of each batch size is a CUDA graph over buffers of its own, so that a launch
costs the host nothing. Two graphs a size take turns, and copies from the host run on a stream of
their own: while one batch is computed, the next arrives. On a CPU it is the model's own call, in
inference mode, a batch at a time.
"""

import contextlib
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import timm.data
import torch
from torch import Tensor, nn

from deit_fast.kernels.patch_embed import normalize_reference

from .layers._bypass import Snapshot, has_hooks
from .layers.vision_transformer import FastTransformer

OUTPUTS = ("logits", "features")
INPUTS = ("float", "uint8")
# What a pass costs whatever its batch, in images: the measure by which the rest of a batch is cut.
# Assumed, not measured.
PASS = 16


@dataclass(frozen=True)
class Memory:
    """Bytes on the model's device: the weights, the engine's static images and results, and what
    the graphs hold for what lies between."""

    weights: int
    buffers: int
    workspace: int

    def __str__(self):
        parts = ("weights", "buffers", "workspace")
        return ", ".join(f"{name} {getattr(self, name) / 1e6:.1f} MB" for name in parts)


def data_config(model: nn.Module) -> dict:
    """timm's data configuration of a model (input_size, mean, std, interpolation, crop_pct, ...),
    with the size and the channels it was really built for: timm's own keeps the architecture's
    where `img_size` or `in_chans` said otherwise."""
    config = timm.data.resolve_model_data_config(model)
    channels, *size = config["input_size"]
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None:
        size = embed.img_size
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    with contextlib.suppress(AttributeError, TypeError):  # not every model has one first conv
        channels = model.get_parameter(f"{first}.weight").shape[1]
    return config | {"input_size": (channels, *size)}


class InferenceEngine:
    """`engine(images) -> logits` for a model in eval mode, accelerated or any other of timm's.

    batch_size: the largest batch that runs at once; batch_sizes: several, e.g. (1, 8, 256). More
    images are cut into batches, fewer are padded to the nearest of these sizes on a GPU.
    dtype, device: what the model is to have, checked; None takes it as it is. image_size: pixels,
    or (height, width); default: the model's. output: "logits", or "features", (B, D), what the
    model's heads work on (timm's pre_logits). prepare: the kinds of input, "float" and "uint8",
    whose graphs are captured now; another's are captured when it first comes.

    Weights that are changed in place (optimiser steps, load_state_dict) are seen by the next call.
    After swapping parameters or modules, moving the model, other heads or hooks, call `refresh()`:
    a call that finds the model changed raises RuntimeError. On a GPU hooks run when a graph is
    captured, and no more; a warning says so.

    Threads: calls from several are safe and run one after the other on the engine's own stream;
    each caller's stream waits for its own result. Pickling or copying an engine builds a new one.

    Raises ValueError for a model in train mode, on several devices or on another one, TypeError for
    another dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int | None = None,
        *,
        batch_sizes: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        image_size: int | tuple[int, int] | None = None,
        output: str = "logits",
        prepare: Sequence[str] = INPUTS,
    ):
        if (batch_size is None) == (batch_sizes is None):
            raise ValueError(
                f"batch_size: {batch_size}, batch_sizes: {batch_sizes}, expected one of them"
            )
        sizes = (batch_size,) if batch_sizes is None else tuple(batch_sizes)
        if not sizes or not all(type(size) is int and size > 0 for size in sizes):
            name = "batch_size" if batch_sizes is None else "batch_sizes"
            raise ValueError(f"{name}: {sizes}, expected whole numbers from 1")
        if output not in OUTPUTS:
            raise ValueError(f"output: {output!r}, expected one of {OUTPUTS}")
        if not set(prepare) <= set(INPUTS):
            raise ValueError(f"prepare: {prepare!r}, expected some of {INPUTS}")
        self.model, self.batch_sizes, self.output = model, tuple(sorted(set(sizes))), output
        self._options = {"dtype": dtype, "device": device, "image_size": image_size}
        self._prepare, self._lock = tuple(prepare), threading.Lock()
        config = data_config(model)
        self.mean, self.std = config["mean"], config["std"]
        channels, *size = config["input_size"]
        if image_size is not None:
            size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.image_shape = (channels, *size)
        self._plan = lru_cache(maxsize=1024)(partial(plan, self.batch_sizes))
        self._read_model()
        self._slots, self._workspace = {}, 0  # (kind, batch size): two slots, the next one first
        if self._graphed:
            self._open()

    def _read_model(self):
        """What the model is; raises where it is no model to run."""
        self.device, self.dtype = _device_and_dtype(self.model, **self._options)
        owners = [m._parameters for m in self.model.modules()]
        owners += [m._buffers for m in self.model.modules()]
        self._where = [(o, name) for o in owners for name, t in o.items() if t is not None]
        self._pointers = self._weights_now()
        self._graphed = has_graphs(self.device)

    def _weights_now(self):
        weights = (owner.get(name) for owner, name in self._where)
        return [None if w is None else (w.data_ptr(), w.dtype) for w in weights]

    def _open(self):
        self._copies, self._passes = (torch.cuda.Stream(self.device) for _ in range(2))
        self._pool = torch.cuda.graph_pool_handle()
        self._arrived, self._over = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.device(self.device):
            for kind in self._prepare:
                for size in reversed(self.batch_sizes):  # they find room in the larger's memory
                    self._capture(kind, size)
        modules = list(self.model.modules())
        self._captured = Snapshot(modules, modules)
        hooked = [n or "(the model)" for n, m in self.model.named_modules() if has_hooks(m)]
        if hooked:
            warnings.warn(
                f"model: hooks on {', '.join(hooked)} ran when the engine's graphs were captured, "
                "and run no more",
                stacklevel=3,
            )

    def __call__(self, images: Tensor) -> Tensor:
        """images: float (B, C, H, W), normalised (another floating dtype is cast to the model's),
        or uint8 (B, H, W, C), normalised with the model's mean and std; on the model's device or on
        the host, there best in pinned memory, and then complete: no stream is waited for. B may be
        0.

        Returns (B, classes) logits, or (B, D) features, in the model's dtype on its device: a new
        tensor. On a GPU the call returns when the images have been copied, and the result is ready
        in the order of the caller's stream, as any of PyTorch's.

        Raises ValueError and TypeError for images that are none, and RuntimeError where the model
        has changed since the engine was built.
        """
        kind = self._kind(images)
        with self._lock:
            self._check_model()
            if self._graphed and len(images):
                return self._replayed(images, kind)
            with torch.inference_mode():
                parts = [
                    self._forward(part.to(self.device))
                    for part in images.split(self.batch_sizes[-1])
                ]
        return torch.cat(parts)  # outside inference mode: a tensor for every use

    def refresh(self) -> None:
        """Read the model anew, and capture again what was captured."""
        with self._lock:
            if self._slots:
                torch.cuda.synchronize(self.device)  # before a graph that runs is destroyed
            self._read_model()
            self._prepare = tuple({kind: None for kind, _ in self._slots}) or self._prepare
            self._slots, self._workspace = {}, 0
            if self._graphed:
                self._open()

    @property
    def memory(self) -> Memory:
        tensors = [owner.get(name) for owner, name in self._where]
        tensors = [t for t in tensors if t is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        slots = [slot for pair in self._slots.values() for slot in pair]
        buffers = sum(slot.images.nbytes + slot.result.nbytes for slot in slots)
        return Memory(sum(storages.values()), buffers, self._workspace)

    def __repr__(self):
        sizes = ", ".join(map(str, self.batch_sizes))
        return (
            f"InferenceEngine({type(self.model).__name__}, batch sizes {sizes}, {self.dtype} on "
            f"{self.device}: {self.memory})"
        )

    def __reduce__(self):
        options = {"batch_sizes": self.batch_sizes, "output": self.output, **self._options}
        return partial(InferenceEngine, **options, prepare=self._prepare), (self.model,)

    def _kind(self, images):
        if not isinstance(images, Tensor):
            raise TypeError(f"images: {type(images).__name__}, expected a torch.Tensor")
        channels, height, width = self.image_shape
        if images.dtype == torch.uint8:
            kind, shape = "uint8", (height, width, channels)
        elif images.is_floating_point():
            kind, shape = "float", self.image_shape
        else:
            raise TypeError(f"images: dtype {images.dtype}, expected floating point or uint8")
        if images.dim() != 4 or tuple(images.shape[1:]) != shape:
            expected = ", ".join(map(str, shape))
            got = tuple(images.shape)
            raise ValueError(f"images: shape {got}, expected (B, {expected}) for {images.dtype}")
        if not on_host(images) and images.device != self.device:
            raise ValueError(f"images: on {images.device}, expected {self.device} or the host")
        return kind

    def _check_model(self):
        if self.model.training:
            raise RuntimeError(
                "model: in train mode since the engine was built, expected model.eval()"
            )
        if self._graphed:
            if self._weights_now() != self._pointers:
                raise RuntimeError(
                    "model: its weights lie elsewhere than when the engine was built: call "
                    "engine.refresh() after swapping or moving them"
                )
            if not self._captured.holds():
                raise RuntimeError(
                    "model: it has other modules or hooks than when the engine was built, and the "
                    "graphs don't run them: call engine.refresh()"
                )
            return
        owner, name = self._where[0]
        if (owner[name].device, owner[name].dtype) != (self.device, self.dtype):
            raise RuntimeError(
                f"model: {owner[name].dtype} on {owner[name].device} now, {self.dtype} on "
                f"{self.device} when the engine was built: call engine.refresh()"
            )

    def _forward(self, images):
        """The pass itself, on the images as they come."""
        with torch.autocast(self.device.type, enabled=False):
            if images.dtype != torch.uint8:
                images = images.to(self.dtype)
            elif not isinstance(self.model, FastTransformer):  # which takes bytes itself
                images = normalize_reference(images, self.mean, self.std, self.dtype)
            if self.output == "logits":
                return self.model(images)
            if isinstance(self.model, FastTransformer):
                return self.model.forward_pre_logits(images)
            return self.model.forward_head(self.model.forward_features(images), pre_logits=True)

    def _capture(self, kind, size):
        channels, height, width = self.image_shape
        shape, dtype = self.image_shape, self.dtype
        if kind == "uint8":
            shape, dtype = (height, width, channels), torch.uint8
        pair = []
        for _ in range(2):
            with torch.inference_mode(False):  # whatever mode the caller is in
                images = torch.zeros(size, *shape, dtype=dtype, device=self.device)
            pair.append(_Slot(self._forward, images, self._pool, self._passes))
            self._workspace += pair[-1].workspace
        self._slots[kind, size] = pair

    def _replayed(self, images, kind):
        with torch.no_grad(), torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            sizes = self._plan(len(images))
            for size in sizes:
                if (kind, size) not in self._slots:
                    self._capture(kind, size)
            one = self._slots[kind, sizes[0]][0].result
            result = one.new_empty(len(images), *one.shape[1:])
            # Images and result are the caller's stream's: used after what it has queued, and given
            # back to it at the end. Copies from the host need not wait for it, nor so for the pass
            # of the last call.
            self._arrived.record(caller)
            self._passes.wait_event(self._arrived)
            stream = self._copies if on_host(images) else self._passes
            first = 0
            try:
                for size in sizes:
                    pair = self._slots[kind, size]
                    slot = pair.pop(0)
                    pair.append(slot)
                    part = images[first : first + size]
                    slot.run(part, result[first : first + len(part)], stream, self._passes)
                    first += len(part)
            finally:
                self._over.record(self._passes)
                caller.wait_event(self._over)
            if on_host(images):  # which may overwrite them from now on
                slot.filled.synchronize()
        return result


class _Slot:
    """One batch size's forward pass as a CUDA graph, and the buffers it reads and writes."""

    def __init__(self, forward, images, pool, stream):
        self.images = images
        self.filled, self.free = torch.cuda.Event(), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream())  # the buffer is filled there
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, and lets libraries take their workspaces
                    forward(images)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            self.graph = torch.cuda.CUDAGraph()
            # Other threads go on using the device meanwhile: a loader that pins, another engine.
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                self.result = forward(images)
        self.workspace = torch.cuda.memory_reserved() - before
        self.free.record(stream)

    def run(self, images, result, copies, passes):
        """Queue the pass of some images: the copy on the stream `copies`, the rest on `passes`."""
        with torch.cuda.stream(copies):
            copies.wait_event(self.free)  # the pass before the last may still read the buffer
            self.images[: len(images)].copy_(images, non_blocking=True)
            self.filled.record(copies)
        with torch.cuda.stream(passes):
            passes.wait_event(self.filled)
            self.graph.replay()
            result.copy_(self.result[: len(images)])
            self.free.record(passes)


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def on_host(images: Tensor) -> bool:
    return images.device.type == "cpu"


def plan(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The captured batch sizes, largest first, that together serve `count` images at least cost,
    where a pass costs its size and `PASS` more."""
    largest = sizes[-1]
    whole, rest = divmod(count, largest)
    best = [(0, ())]  # of 0, 1, ... images: cost, sizes
    for n in range(1, rest + 1):
        options = ((best[max(n - s, 0)], s) for s in sizes)
        best.append(min((cost + s + PASS, (*chosen, s)) for (cost, chosen), s in options))
    return (largest,) * whole + tuple(sorted(best[rest][1], reverse=True))


def _device_and_dtype(model, dtype, device, image_size):
    training = [name or "(the model)" for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"model: {len(training)} of its modules are in train mode ({training[0]} first), expected "
            "model.eval()"
        )
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError("model: has no parameters, expected a model")
    devices = {p.device for p in parameters}
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    for what, found in (("device", devices), ("dtype", dtypes)):
        if len(found) != 1:
            raise ValueError(f"model: parameters of {_listed(found)}, expected one {what}")
    (found,), (found_dtype,) = devices, dtypes
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"model: on {found}, expected a CPU or a CUDA device")
    wanted = found if device is None else torch.device(device)
    if wanted.type != found.type or wanted.index not in (None, found.index):
        raise ValueError(f"model: on {found}, device asks for {wanted}: call model.to({wanted})")
    if dtype not in (None, found_dtype):
        raise TypeError(f"model: {found_dtype}, dtype asks for {dtype}: call model.to({dtype})")
    return found, found_dtype


def _listed(found):
    return ", ".join(sorted(map(str, found)))
