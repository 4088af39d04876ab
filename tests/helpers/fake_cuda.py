"""CUDA's streams, events and graphs simulated on a CPU, with a detector of data races.

Work runs at once, but each storage remembers in vector clocks which stream read and wrote it last.
An access that no event orders after an earlier one might come first on a GPU: it is an error.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from deit_fast import _cuda_graph, _engine_images

HOST = "host"


class Race(AssertionError):
    """Two accesses of one storage that no event orders."""


class Stream:
    def __init__(self, name):
        self.name, self.clock = name, {name: 0}

    def _see(self, clock):
        for name, time in clock.items():
            self.clock[name] = max(self.clock.get(name, 0), time)

    def wait_event(self, event):
        self._see(event.clock)

    def wait_stream(self, other):
        self._see(other.clock)


class FakeCuda(TorchDispatchMode):
    """Replaces `torch.cuda` while it is active.

    `on(stream)` and `host()` say what runs the code of the test itself; everything else runs on the
    stream `caller`.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.host_actor = Stream(HOST)
        self.caller = Stream("caller")
        self.here, self.storages, self.recording = None, {}, None
        self.streams = self.replays = self.reserved = 0
        self.pinned = False  # whether images on the host lie in pinned memory
        fake = self

        class Event:
            clock = {}

            def record(self, stream):
                self.clock = dict(stream.clock)

            def synchronize(self):
                fake.host_actor._see(self.clock)

        class CUDAGraph:
            def replay(self):
                fake.replays += 1
                with torch.inference_mode():
                    for function, args, kwargs, result in self.recorded:
                        fake._redo(function, args, kwargs, result)

        @contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode="global"):
            assert stream is None or capture_error_mode == "thread_local"
            stream = stream or fake.here or fake.caller  # a capture does not run: no order
            graph.recorded = fake.recording = []
            with fake.on(stream):
                yield
            fake.recording = None
            fake.reserved += 1000

        def new_stream(device=None):
            self.streams += 1
            return Stream(f"stream {self.streams}")

        @contextmanager
        def device(device):
            yield

        for name, value in {
            "Stream": new_stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph,
            "stream": self.on, "device": device,
            "current_stream": lambda device=None: self.here or self.caller,
            "synchronize": lambda device=None: None,  # the engine may not rely on what it waits for
            "empty_cache": lambda: None,
            "memory_reserved": lambda: self.reserved, "graph_pool_handle": lambda: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            _cuda_graph, "stream_handle", lambda index: id(self.here or self.caller)
        )

        def stage(buffer, images):
            with self.host():
                buffer.copy_(images)

        for name, value in {
            "stage": stage, "pinned_buffer": lambda shape, dtype: torch.empty(shape, dtype=dtype),
            "is_pinned": lambda images: self.pinned,
        }.items():  # fmt: skip
            monkeypatch.setattr(_engine_images, name, value)

    @contextmanager
    def on(self, stream):
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    def host(self):
        return self.on(self.host_actor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self._account(function, args, kwargs, result)
        if self.recording is not None:
            # the memory that it has now, whatever becomes of a parameter's `.data`
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            self.recording.append((function, args, kwargs, result))
        return result

    def _redo(self, function, args, kwargs, result):
        """Run it again as a graph does, on the same addresses."""
        new = function(*args, **kwargs)
        self._account(function, args, kwargs, result)
        known = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for before, after in zip(tree_iter(result), tree_iter(new), strict=True):
            if isinstance(before, torch.Tensor) and _storage(before) not in known:
                before.copy_(after)

    def _account(self, function, args, kwargs, result):
        stream = self.here or self.caller
        if stream is not self.host_actor:
            stream._see(self.host_actor.clock)  # what the host did before it queued this
        stream.clock[stream.name] += 1
        arguments = function._schema.arguments
        written = set()
        for argument, value in zip(arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {_storage(t) for t in tree_iter(value) if isinstance(t, torch.Tensor)}
        inputs = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        view = any(r.alias_info is not None for r in function._schema.returns) and not written
        filled = "empty" not in function._schema.name
        if filled and not view:
            for storage in inputs:
                self._access(storage, stream, storage in written, function)
        for t in tree_iter(result):
            if isinstance(t, torch.Tensor) and _storage(t) not in inputs:
                self.storages.pop(_storage(t), None)  # new memory
                if filled:
                    self._access(_storage(t), stream, True, function)

    def _access(self, storage, stream, write, function):
        if not storage:  # an empty tensor has none
            return
        accesses = self.storages.setdefault(storage, {})
        for (name, was_write), time in accesses.items():
            if (write or was_write) and stream.clock.get(name, 0) < time:
                kind = "a write" if was_write else "a read"
                raise Race(f"{function} on {stream.name} may overtake {kind} on {name}")
        accesses[stream.name, write] = stream.clock[stream.name]


def _storage(t):
    return t.untyped_storage().data_ptr()
