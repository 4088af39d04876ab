"""InferenceEngine: images in, logits out, with as little as possible in between.

On a GPU the forward pass of each batch size is a CUDA graph over static buffers, so that the host
launches no kernel. There are two graphs for each size, which alternate, and copies from the host
run on a stream of their own: while one batch is computed, the next is copied. On a CPU the engine
calls the model in inference mode, a batch at a time, or what torch.compile makes of it.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from deit_fast.kernels.patch_embed import normalize_reference

from ._cuda_graph import GraphedForward
from ._model_config import data_config, device_and_dtype
from .layers._hooks import has_hooks
from .layers._snapshot import Snapshot
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
    `refresh()`: a call that finds the model changed raises RuntimeError. On a GPU hooks run only
    when a graph is captured; a warning says so.

    Calls from several threads are safe and run one after the other on the engine's own stream; the
    stream of each caller waits for its own result. Pickling or copying an engine builds a new one.

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
        # of each (kind of input, batch size) two graphs, the next one first
        self._graphs: dict[tuple[str, int], list[GraphedForward]] = {}
        self._workspace = 0
        if self._compile and self.device.type != "cpu":
            raise ValueError(
                f"compile: {compile} with a model on {self.device}, expected a CPU: elsewhere the "
                "engine's CUDA graphs save the time between operations"
            )
        self._prepare_all()

    def _prepare_all(self) -> None:
        """Capture or compile for every batch size."""
        modules = list(self.model.modules())
        self._built_of, self._heads = Snapshot(modules, modules), getattr(self.model, "heads", None)
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
        owners: list[dict[str, Any]] = [m._parameters for m in self.model.modules()]
        owners += [m._buffers for m in self.model.modules()]
        self._where = [(o, name) for o in owners for name, t in o.items() if t is not None]
        self._pointers = self._weights_now()
        self._graphed = has_graphs(self.device)

    def _weights_now(self) -> list[tuple[int, torch.dtype] | None]:
        weights = (owner.get(name) for owner, name in self._where)
        return [None if w is None else (w.data_ptr(), w.dtype) for w in weights]

    def _capture_all(self) -> None:
        self._copies, self._compute = (torch.cuda.Stream(self.device) for _ in range(2))
        self._pool = torch.cuda.graph_pool_handle()
        self._queued, self._done = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.device(self.device):
            for kind in self._prepare:
                for size in reversed(self.batch_sizes):  # the smaller reuse the larger's memory
                    self._capture(kind, size)
        hooked = [n or "(the model)" for n, m in self.model.named_modules() if has_hooks(m)]
        if hooked:
            warnings.warn(
                f"model: hooks on {', '.join(hooked)} ran when the engine's graphs were captured, "
                "and run no more",
                stacklevel=3,
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Run the model.

        Args:
            images: float (B, C, H, W), normalised (another floating dtype is cast to the model's),
                or uint8 (B, H, W, C), which is normalised with the model's mean and std. B may be
                0. They are on the model's device, or on the host, best in pinned memory; those on
                the host must be complete, since no stream is waited for.

        Returns:
            (B, classes) logits or (B, D) features, a new tensor in the model's dtype on its device.
            On a GPU the call returns when the images have been copied. The result is ready in the
            order of the caller's stream, like any of PyTorch's.

        Raises:
            ValueError: for images of another shape or on another device.
            TypeError: for images of another type.
            RuntimeError: if the model has changed since the engine was built.
        """
        kind = self._kind(images)
        with self._lock:
            self._check_model()
            if self._graphed and len(images):
                return self._replay(images, kind)
            parts = self._call(images)
        return torch.cat(parts)  # outside inference mode: a tensor for every use

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
                part, kind = images[first : first + size], self._kind(images)
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
            if self._graphs:
                torch.cuda.synchronize(self.device)  # before a graph that runs is destroyed
            self._read_model()
            self._prepare = tuple({kind: None for kind, _ in self._graphs}) or self._prepare
            self._graphs, self._workspace = {}, 0
            self._prepare_all()

    @property
    def memory(self) -> Memory:
        """The memory that the model and the engine's graphs take now."""
        tensors = [t for owner, name in self._where if (t := owner.get(name)) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        graphs = [graph for pair in self._graphs.values() for graph in pair]
        buffers = sum(graph.images.nbytes + graph.result.nbytes for graph in graphs)
        return Memory(sum(storages.values()), buffers, self._workspace)

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

    def _kind(self, images: Tensor) -> str:
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

    def _check_model(self) -> None:
        if self.model.training:
            raise RuntimeError(
                "model: in train mode since the engine was built, expected model.eval()"
            )
        if self._graphed or self._compile:
            if self._weights_now() != self._pointers:
                raise RuntimeError(
                    "model: its weights lie elsewhere than when the engine was built: call "
                    "engine.refresh() after replacing or moving them"
                )
            heads = getattr(self.model, "heads", None)
            if not self._built_of.is_current() or heads != self._heads:
                raise RuntimeError(
                    "model: it has other modules, heads or hooks than when the engine was built, "
                    "and its graphs don't run them: call engine.refresh()"
                )
            return
        owner, name = self._where[0]
        if (owner[name].device, owner[name].dtype) != (self.device, self.dtype):
            raise RuntimeError(
                f"model: {owner[name].dtype} on {owner[name].device} now, {self.dtype} on "
                f"{self.device} when the engine was built: call engine.refresh()"
            )

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

    def _capture(self, kind, size):
        pair = []
        for _ in range(2):
            images = self._blank(kind, size)
            pair.append(GraphedForward(self._forward, images, self._pool, self._compute))
            self._workspace += pair[-1].workspace
        self._graphs[kind, size] = pair

    def _replay(self, images, kind):
        with torch.no_grad(), torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            sizes = self._plan(len(images))
            for size in sizes:
                if (kind, size) not in self._graphs:
                    self._capture(kind, size)
            one = self._graphs[kind, sizes[0]][0].result
            result = one.new_empty(len(images), *one.shape[1:])
            # Images and result belong to the caller's stream: they are used after what it has
            # queued, and given back to it at the end. Copies from the host wait neither for that
            # nor for the forward pass of the last call.
            self._queued.record(caller)
            self._compute.wait_event(self._queued)
            stream = self._copies if on_host(images) else self._compute
            first = 0
            try:
                for size in sizes:
                    pair = self._graphs[kind, size]
                    graph = pair.pop(0)
                    pair.append(graph)
                    part = images[first : first + size]
                    graph.replay(part, result[first : first + len(part)], stream, self._compute)
                    first += len(part)
            finally:
                self._done.record(self._compute)
                caller.wait_event(self._done)
            if on_host(images):  # the caller may overwrite them from now on
                graph.filled.synchronize()
        return result


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


def on_host(images: Tensor) -> bool:
    """Whether images are in host memory."""
    return images.device.type == "cpu"


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
