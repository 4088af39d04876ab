"""A forward pass of one batch size as a CUDA graph, with the static buffers it reads and writes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GraphedForward:
    """A captured forward pass. `replay` copies images in, replays the graph and copies results out.

    Args:
        forward: what is captured; called with `images`.
        images: (batch size, ...), the static input, filled on the current stream.
        pool: of `torch.cuda.graph_pool_handle()`, shared by graphs that never run at once.
        stream: on which the graph is captured.

    Attributes:
        images: the static input.
        result: the static output.
        filled: the event after the last copy into `images`.
        free: the event after the last read of `images` and `result`.
        workspace: bytes that the capture reserved beyond both.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, pool: Any, stream: Any
    ) -> None:
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

    def replay(self, images: Tensor, result: Tensor, copies: Any, compute: Any) -> None:
        """Queue the forward pass of at most a batch of images.

        Args:
            images: (B, ...).
            result: (B, ...), the output.
            copies: the stream on which images are copied in.
            compute: the stream on which the graph runs and results are copied out.
        """
        with torch.cuda.stream(copies):
            copies.wait_event(self.free)  # the forward before the last may still read the buffer
            self.images[: len(images)].copy_(images, non_blocking=True)
            self.filled.record(copies)
        with torch.cuda.stream(compute):
            compute.wait_event(self.filled)
            self.graph.replay()
            result.copy_(self.result[: len(images)])
            self.free.record(compute)
