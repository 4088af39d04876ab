"""InferenceEngine: images in, logits out, with as little as possible in between.

On a GPU the forward pass of each batch size is a CUDA graph over static buffers, so that the host
launches no kernel (_cuda_graph.py). There are two graphs for each size, which alternate, and copies
from the host run on a stream of their own (_engine_images.py): while one batch is computed, the
next is copied. That the model is still the one that was captured is checked while the GPU works,
before the result is handed out (_engine_checks.py). On a CPU the engine calls the model in
inference mode, a batch at a time, or what torch.compile makes of it.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deit_fast.kernels.patch_embed import normalize_reference

from . import _engine_images
from ._cuda_graph import Graphs, Ready
from ._engine_checks import ModelCheck
from ._engine_images import as_tensor, kind_of
from ._model_config import data_config, device_and_dtype
from .layers._hooks import has_hooks
from .layers.vision_transformer import FastTransformer

OUTPUTS = ("logits", "features")
INPUTS = ("float", "uint8")
# The fixed cost of a forward pass whatever its batch size, in images, for `plan_batches`. Assumed,
# not measured.
FIXED_COST = 16


@dataclass(frozen=True)
class Memory:
    """Bytes of an engine on the model's device; `str()` of it is a text in MB.

    Attributes:
        weights: parameters and buffers of the model.
        buffers: static inputs and outputs of the graphs.
        workspace: what the graphs reserve for intermediate tensors.
    """

    weights: int
    buffers: int
    workspace: int

    def __str__(self):
        parts = ("weights", "buffers", "workspace")
        return ", ".join(f"{name} {getattr(self, name) / 1e6:.1f} MB" for name in parts)


class InferenceEngine:
    """`engine(images) -> logits` for a model in eval mode, accelerated or any other of timm's.

    Weights that are changed in place (optimizer steps, load_state_dict) are used by the next call.
    After replacing parameters or modules, moving the model, or setting other heads or hooks, call
    `refresh()`: a call that finds the model changed raises RuntimeError. On a GPU it looks for
    changes after it has queued the work, and hands out no result of a model that changed; the
    memory of the weights that were captured stays reserved until `refresh()`. Hooks run only when a
    graph is captured there; a warning says so.

    Calls from several threads are safe and run one after the other, each on its caller's stream.
    Pickling or copying an engine builds a new one.

    Args:
        model: the model, in eval mode.
        batch_size: the largest batch that runs at once.
        batch_sizes: several of them instead, e.g. (1, 8, 256). More images are split into batches;
            on a GPU fewer are padded to the nearest size.
        dtype: that the model is expected to have; None: any.
        device: that the model is expected to be on; None: any.
        image_size: in pixels, or (height, width). Default: the model's.
        output: "logits", or "features", (B, D), the input of the model's heads (timm's pre_logits).
        prepare: the kinds of input, "float" and "uint8", whose graphs are captured, or whose code
            is compiled, now. Those of the other kind are at its first call.
        compile: on a CPU, call what torch.compile makes of the model for each batch size, which
            takes a minute and needs a C++ compiler. It saves the time that Python takes between
            operations. Fewer images are padded to the nearest size, as on a GPU. A model that
            torch.compile cannot take as one graph raises its error.

    Raises:
        ValueError: for options that do not fit, and for a model in train mode, on several devices
            or on another one.
        TypeError: for a model of another dtype.
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
        compile: bool = False,
    ) -> None:
        if (batch_size is None) == (batch_sizes is None):
            raise ValueError(
                f"batch_size: {batch_size}, batch_sizes: {batch_sizes}, expected one of them"
            )
        sizes: tuple[Any, ...] = (batch_size,) if batch_sizes is None else tuple(batch_sizes)
        if not sizes or not all(type(size) is int and size > 0 for size in sizes):
            name = "batch_size" if batch_sizes is None else "batch_sizes"
            raise ValueError(f"{name}: {sizes}, expected whole numbers from 1")
        if output not in OUTPUTS:
            raise ValueError(f"output: {output!r}, expected one of {OUTPUTS}")
        if not set(prepare) <= set(INPUTS):
            raise ValueError(f"prepare: {prepare!r}, expected some of {INPUTS}")
        self.model, self.batch_sizes, self.output = model, tuple(sorted(set(sizes))), output
        self._expected: dict[str, Any] = {"dtype": dtype, "device": device}
        self._image_size = image_size
        self._prepare, self._lock = tuple(prepare), threading.Lock()
        self._compile, config = compile, data_config(model)
        self.mean, self.std = config["mean"], config["std"]
        channels, *size = config["input_size"]
        if image_size is not None:
            size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.image_shape = (channels, *size)
        self._plan = lru_cache(maxsize=1024)(partial(plan_batches, self.batch_sizes))
        self._read_model()
        self._graphs: Graphs | None = None
        # of images on the GPU that one graph has room for: (shape, dtype, device) -> what runs
        self._ready: dict[tuple[Any, ...], Ready] = {}
        if self._compile and self.device.type != "cpu":
            raise ValueError(
                f"compile: {compile} with a model on {self.device}, expected a CPU: elsewhere the "
                "engine's CUDA graphs save the time between operations"
            )
        self._prepare_all()

    def _prepare_all(self) -> None:
        """Capture or compile for every batch size."""
        captured = self._graphed or self._compile
        self._check = ModelCheck(self.model, self.device, self.dtype, captured)
        if self._graphed:
            self._capture_all()
        elif self._compile:
            self._compiled: dict[tuple[str, int], tuple[Tensor, Callable]] = {}
            for kind in self._prepare:
                for size in self.batch_sizes:
                    self._call(self._blank(kind, size))

    def _read_model(self) -> None:
        """Read device, dtype and weights of the model; raises if it can't run."""
        self.device, self.dtype = device_and_dtype(self.model, **self._expected)
        self._graphed = has_graphs(self.device)

    def _capture_all(self) -> None:
        self._graphs = Graphs(self._forward, self._blank, self.device)
        for kind in self._prepare:
            for size in reversed(self.batch_sizes):  # the smaller reuse the larger's memory
                self._graphs.capture(kind, size)
        hooked = [n or "(the model)" for n, m in self.model.named_modules() if has_hooks(m)]
        if hooked:
            warnings.warn(
                f"model: hooks on {', '.join(hooked)} ran when the engine's graphs were captured, "
                "and run no more",
                stacklevel=3,
            )

    def __call__(self, images: Tensor | np.ndarray) -> Tensor:
        """Run the model.

        Args:
            images: float (B, C, H, W), normalised (another floating dtype is cast to the model's),
                or uint8 (B, H, W, C), which is normalised with the model's mean and std. B may be
                0. A tensor on the model's device or on the host, or a numpy array. The least host
                time is that of a tensor on the device, of the model's dtype, with as many images
                as one of the batch sizes. Those on the host must be complete, since no stream is
                waited for.

        Returns:
            (B, classes) logits or (B, D) features, a new tensor in the model's dtype on its device.
            On a GPU the call returns when the memory of images on the host may be used again. The
            result is ready in the order of the caller's stream, like any of PyTorch's.

        Raises:
            ValueError: for images of another shape or on another device.
            TypeError: for images of another type.
            RuntimeError: if the model has changed since the engine was built.
        """
        with self._lock:
            ready = self._find_ready(images)
            if ready is not None:
                assert self._graphs is not None
                result = self._graphs.run_ready(ready, images)  # type: ignore[arg-type]
                self._check.require_unchanged()  # while the GPU works
                return result
        return self._call_any(as_tensor(images))

    def _find_ready(self, images: Any) -> Ready | None:
        """What runs for images on the GPU like those of an earlier call; None: all is checked."""
        try:
            if images.requires_grad:
                return None
            return self._ready.get((images.shape, images.dtype, images.device))
        except AttributeError:
            return None

    def _call_any(self, images: Tensor) -> Tensor:
        """The call for images of any kind, number and place."""
        kind = kind_of(images, self.image_shape, self.device)
        with self._lock:
            if self._graphs is not None and len(images):
                sizes = self._plan(len(images))
                self._capture_missing(kind, sizes)
                result = self._graphs.run(images, kind, sizes)
                self._check.require_unchanged()
                if len(sizes) == 1 and not _engine_images.on_host(images):
                    key = images.shape, images.dtype, images.device
                    self._ready[key] = self._graphs.ready(kind, sizes[0], len(images))
                return result
            self._check.require_unchanged()
            parts = self._call(images)
        return torch.cat(parts)  # outside inference mode: a tensor for every use

    def _capture_missing(self, kind: str, sizes: tuple[int, ...]) -> None:
        assert self._graphs is not None
        missing = {size for size in sizes if (kind, size) not in self._graphs.pairs}
        if missing:
            self._check.require_unchanged()  # later the change may be undone, but for the graph
        for size in missing:
            self._graphs.capture(kind, size)

    def _call(self, images: Tensor) -> list[Tensor]:
        """The results of a CPU, or of no images, a batch at a time."""
        if self._compile and len(images):
            return self._call_compiled(images)
        with torch.inference_mode():
            return [self._forward(p.to(self.device)) for p in images.split(self.batch_sizes[-1])]

    def _call_compiled(self, images: Tensor) -> list[Tensor]:
        parts, first = [], 0
        with torch.inference_mode(False), torch.no_grad():
            for size in self._plan(len(images)):
                part = images[first : first + size]
                kind = kind_of(images, self.image_shape, self.device)
                first += size
                if (kind, size) not in self._compiled:
                    self._compiled[kind, size] = self._blank(kind, size), compiled(self._forward)
                # an own buffer: PyTorch compiles anew for a tensor of inference mode
                buffer, forward = self._compiled[kind, size]
                buffer[: len(part)] = part
                parts.append(forward(buffer)[: len(part)])
        return parts

    def refresh(self) -> None:
        """Read the model again, and capture again what was captured."""
        with self._lock:
            if self._graphs is not None:
                torch.cuda.synchronize(self.device)  # before a graph that runs is destroyed
                kinds = {kind: None for kind, _ in self._graphs.pairs}
                self._prepare = tuple(kinds) or self._prepare
            self._read_model()
            self._graphs, self._ready = None, {}
            self._prepare_all()

    @property
    def memory(self) -> Memory:
        """The memory that the model and the engine's graphs take now."""
        own = [t.untyped_storage() for t in self._check.tensors()]
        storages = {storage.data_ptr(): storage.nbytes() for storage in own}
        pairs = [] if self._graphs is None else self._graphs.pairs.values()
        buffers = sum(g.images.nbytes + g.result.nbytes for pair in pairs for g in pair)
        workspace = 0 if self._graphs is None else self._graphs.workspace
        return Memory(sum(storages.values()), buffers, workspace)

    def __repr__(self):
        sizes = ", ".join(map(str, self.batch_sizes))
        return (
            f"InferenceEngine({type(self.model).__name__}, batch sizes {sizes}, {self.dtype} on "
            f"{self.device}: {self.memory})"
        )

    def __reduce__(self):
        options = {
            "batch_sizes": self.batch_sizes, "image_size": self._image_size, "output": self.output,
            "prepare": self._prepare, "compile": self._compile, **self._expected,
        }  # fmt: skip
        return partial(InferenceEngine, **options), (self.model,)

    def _forward(self, images):
        """The forward pass that is captured, or called on a CPU."""
        with torch.autocast(self.device.type, enabled=False):
            if images.dtype != torch.uint8:
                images = images.to(self.dtype)
            elif not isinstance(self.model, FastTransformer):  # which takes bytes itself
                images = normalize_reference(images, self.mean, self.std, self.dtype)
            if self.output == "logits":
                return self.model(images)
            if isinstance(self.model, FastTransformer):
                return self.model.forward_pre_logits(images)
            model: Any = self.model  # timm's
            return model.forward_head(model.forward_features(images), pre_logits=True)

    def _blank(self, kind: str, size: int) -> Tensor:
        channels, height, width = self.image_shape
        shape, dtype = self.image_shape, self.dtype
        if kind == "uint8":
            shape, dtype = (height, width, channels), torch.uint8
        with torch.inference_mode(False):  # whatever mode the caller is in
            return torch.zeros(size, *shape, dtype=dtype, device=self.device)


def compiled(forward: Any) -> Callable[[Tensor], Tensor]:
    """torch.compile of a method, as one graph for one shape.

    PyTorch keeps what it compiled with the method's code, for 8 models or shapes at most: so this
    compiles a copy. Guards on modules, 1 ms a call, are left out: the engine checks the model.
    """
    function = forward.__func__
    alone = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    method = MethodType(alone, forward.__self__)
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    return torch.compile(method, dynamic=False, fullgraph=True, options={"guard_filter_fn": skip})


def has_graphs(device: torch.device) -> bool:
    """Whether an engine on this device captures CUDA graphs."""
    return device.type == "cuda"


def plan_batches(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Split `count` images into batches at the least cost: the size and `FIXED_COST` for each.

    Args:
        sizes: the batch sizes there are, ascending.
        count: the number of images.

    Returns:
        The sizes of the batches, largest first; only the last one may be padded.
    """
    largest = sizes[-1]
    whole, rest = divmod(count, largest)
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]  # of 0, 1, ... images: cost, sizes
    for n in range(1, rest + 1):
        options = ((best[max(n - s, 0)], s) for s in sizes)
        best.append(min((cost + s + FIXED_COST, (*chosen, s)) for (cost, chosen), s in options))
    return (largest,) * whole + tuple(sorted(best[rest][1], reverse=True))
