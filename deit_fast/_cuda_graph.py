"""Forward passes as CUDA graphs, with the static buffers that they read and write.

What runs where: graphs, and copies on the GPU, run on the stream of the caller, so that in a row of
calls on one stream nothing has to be waited for. All graphs of an engine share one pool of memory
and must not run at once: a call on another stream waits for the last one. Images from the host are
copied on a stream of their own, while the last forward pass is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _engine_images


class GraphedForward:
    """A captured forward pass of one batch size.

    Args:
        forward: what is captured; called with `images`.
        images: (batch size, ...), the static input, filled on the current stream.
        pool: of `torch.cuda.graph_pool_handle()`, shared by graphs that never run at once.
        stream: on which the graph is captured.

    Attributes:
        images: the static input.
        result: the static output.
        filled: the event after the last copy from the host into `images`.
        free: the event after the last read of `images` and `result`.
        workspace: bytes that the capture reserved beyond both.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, pool: Any, stream: Any
    ) -> None:
        self.images = images
        self.filled, self.free = torch.cuda.Event(), torch.cuda.Event()
        self._pinned: dict[torch.dtype, Tensor] = {}
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
        self.filled.record(stream)
        self.free.record(stream)

    def fill(self, images: Tensor, copies: Any) -> bool:
        """Queue the copy of images from the host into the static input.

        Args:
            images: (B, ...), at most a batch.
            copies: the stream of the copy.

        Returns:
            Whether `images` are read by the copy itself, so that their memory is free only after
            `filled`: those in pinned memory.
        """
        direct = _engine_images.is_pinned(images)
        if not direct:
            images = self._staged(images)
        with torch.cuda.stream(copies):
            copies.wait_event(self.free)  # the forward before the last may still read the buffer
            if images.dtype != self.images.dtype:  # else the host would cast them
                images = images.to(self.images.device, non_blocking=True)
            self.images[: len(images)].copy_(images, non_blocking=True)
            self.filled.record(copies)
        return direct

    def _staged(self, images: Tensor) -> Tensor:
        if images.dtype not in self._pinned:
            shape = tuple(self.images.shape)
            self._pinned[images.dtype] = _engine_images.pinned_buffer(shape, images.dtype)
        buffer = self._pinned[images.dtype][: len(images)]
        self.filled.synchronize()  # the copy before the last may still read it
        _engine_images.stage(buffer, images)
        return buffer


@dataclass(frozen=True)
class Ready:
    """What a call runs whose images make one batch and lie on the GPU: four methods, bound.

    Attributes:
        copy_in: of the static input, as long as the images.
        replay: of the graph.
        copy_out: of the static output, as long as the images; makes a new tensor.
        record: of the event that is `free` of the graph.
        free: that event.
    """

    copy_in: Callable[[Tensor], Any]
    replay: Callable[[], None]
    copy_out: Callable[[], Tensor]
    record: Callable[[Any], None]
    free: Any


class Graphs:
    """The graphs of an engine: two of each kind of input and batch size, which alternate.

    Args:
        forward: what is captured.
        blank: makes a static input of a kind and a batch size.
        device: the GPU.

    Attributes:
        pairs: (kind, batch size) -> two graphs, the next one first.
        workspace: bytes that all captures reserved.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        blank: Callable[[str, int], Tensor],
        device: torch.device,
    ) -> None:
        self._forward, self._blank, self._device = forward, blank, device
        self._copies, self._capturing = (torch.cuda.Stream(device) for _ in range(2))
        self._pool = torch.cuda.graph_pool_handle()
        self._index = device.index or 0
        self._last: Any = None  # the event after the last use of the pool's memory
        self._stream: Any = None  # on which that was
        self._handle: int | None = None  # CUDA's, of that stream
        self.pairs: dict[tuple[str, int], list[GraphedForward]] = {}
        self.workspace = 0

    def capture(self, kind: str, size: int) -> None:
        """Capture both graphs of a kind of input and a batch size."""
        pair = []
        with torch.cuda.device(self._device):
            for _ in range(2):
                if self._last is not None:
                    self._capturing.wait_event(self._last)
                images = self._blank(kind, size)
                pair.append(GraphedForward(self._forward, images, self._pool, self._capturing))
                self.workspace += pair[-1].workspace
                self._last, self._handle = pair[-1].free, None
        self.pairs[kind, size] = pair

    def ready(self, kind: str, size: int, count: int) -> Ready:
        """What runs for `count` images on the GPU, in a batch of that size."""
        graph = self.pairs[kind, size][0]
        with torch.inference_mode(False), torch.no_grad():
            images, result = graph.images[:count], graph.result[:count]
        free = graph.free
        return Ready(images.copy_, graph.graph.replay, result.clone, free.record, free)

    def run_ready(self, ready: Ready, images: Tensor) -> Tensor:
        """Queue the forward pass of one batch on the caller's stream.

        Args:
            ready: of images like these.
            images: (B, ...), on the GPU, without gradient.

        Returns:
            (B, ...), a new tensor.
        """
        self.enter()
        try:
            ready.copy_in(images)
            ready.replay()
            return ready.copy_out()
        finally:
            ready.record(self._stream)
            self._last = ready.free

    def run(self, images: Tensor, kind: str, sizes: Sequence[int]) -> Tensor:
        """Queue the forward passes of any number of images on the caller's stream.

        Args:
            images: (B, ...), on the GPU or the host, B > 0.
            kind: of input.
            sizes: of the batches they are split into, all captured.

        Returns:
            (B, ...), a new tensor.
        """
        host, first, read = _engine_images.on_host(images), 0, None
        with torch.no_grad(), torch.cuda.device(self._device):
            self.enter()
            one = self.pairs[kind, sizes[0]][0].result
            result = one.new_empty(len(images), *one.shape[1:])
            for size in sizes:
                pair = self.pairs[kind, size]
                pair.reverse()
                graph, part = pair[1], images[first : first + size]
                if not host:
                    graph.images[: len(part)].copy_(part)
                elif graph.fill(part, self._copies):
                    read = graph.filled
                if host:
                    self._stream.wait_event(graph.filled)
                try:
                    graph.graph.replay()
                    result[first : first + len(part)].copy_(graph.result[: len(part)])
                finally:
                    graph.free.record(self._stream)
                    self._last = graph.free
                first += len(part)
            if read is not None:  # the caller may overwrite them from now on
                read.synchronize()
        return result

    def enter(self) -> None:
        """Make the caller's stream wait for the last call, where that was on another."""
        handle = stream_handle(self._index)
        if handle != self._handle:
            with torch.cuda.device(self._device):
                self._stream = torch.cuda.current_stream()
            self._stream.wait_event(self._last)
            self._handle = handle


def stream_handle(index: int) -> int:
    """CUDA's handle of the current stream of a GPU: a tenth of `torch.cuda.current_stream`."""
    return torch._C._cuda_getCurrentRawStream(index)
