"""CUDA graphs that are not there: an InferenceEngine captures and replays on CPU tensors, and what
its call costs the host can be measured.

Of torch.cuda's Python what a call passes through stays: the contexts of streams and devices, the
current stream. Streams, events and graphs, and what torch.cuda calls in C, do nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch


class _Stream:
    device, stream_id, device_index, device_type = torch.device("cuda", 0), 0, 0, 1

    def __init__(self, *args, **options):
        pass

    def wait_event(self, event):
        event.wait(self)

    def wait_stream(self, stream):
        pass


class _Event:
    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass


class _Graph:
    def replay(self):
        pass


class _Device(torch.cuda.device):
    def __init__(self, device):
        super().__init__(0)


def _nothing(*args, **options):
    return 0


@contextmanager
def no_graphs() -> Iterator[None]:
    """Within it engines are built and called; images count as lying on the GPU."""
    graphs = {"has_graphs": lambda device: True}
    cuda = {
        "_initialized": True, "Stream": _Stream, "Event": _Event, "CUDAGraph": _Graph,
        "graph": lambda *args, **options: nullcontext(), "device": _Device,
        "_exchange_device": _nothing, "_maybe_exchange_device": _nothing, "synchronize": _nothing,
        "empty_cache": _nothing, "memory_reserved": _nothing, "graph_pool_handle": _nothing,
    }  # fmt: skip
    in_c = {
        "_cuda_getDevice": _nothing, "_cuda_setStream": _nothing,
        "_cuda_getDeviceCount": lambda: 1, "_cuda_getCurrentStream": lambda device: (0, 0, 1),
        "_cuda_getCurrentRawStream": _nothing,
    }  # fmt: skip
    with (
        mock.patch.multiple("deit_fast.engine", **graphs),
        mock.patch.multiple("deit_fast._engine_images", on_host=lambda images: False),
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(torch._C, create=True, **in_c),
    ):
        yield
