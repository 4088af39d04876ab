"""One call of a network in one mode: forward, forward and backward, or a full training step."""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

import deit_fast
from deit_fast.quantization import QuantizationReport

from .modes import Mode
from .network import Network

LEARNING_RATE = 1e-5  # timed steps are real: weights drift, so little that nothing overflows


class Step:
    """A copy of a network that runs in one mode.

    A full step is forward, backward and fused AdamW, under fp16 autocast through a GradScaler.

    Attributes:
        model: The copy, in the mode's dtype and layout.
        optimizer: AdamW of a full step; None of others.
        scaler: A full step's GradScaler under fp16 autocast, or None.
        engine: The InferenceEngine of such a mode, once it was called; None of others.
        skipped: Of a quantized mode, which layers of the Blocks are not quantized, and why; or
            None.
    """

    def __init__(self, network: Network, mode: Mode, compiled: bool = True, optimize: bool = False):
        """Copy the network and prepare the copy for the mode.

        Args:
            network: Its model stays as it is.
            mode: One that the network has; its `settings()` have to hold around every call.
            compiled: With torch.compile, an engine or a CUDA graph where the mode has one. False
                runs the same modules eagerly.
            optimize: A full step, for a mode that trains.
        """
        self.mode, self.device = mode, network.device
        self.model = copy.deepcopy(network.model)
        if mode.fast:
            deit_fast.accelerate(self.model)
        layout = torch.channels_last if network.channels_last(mode) else torch.contiguous_format
        self.layout = layout
        self.model.to(mode.dtype).to(memory_format=layout).train(mode.train)
        self.skipped: str | None = None
        if mode.torchao:
            self.skipped = _quantize_by_torchao(self.model)
        elif mode.quantized_format:  # bound-derived scales: calibrated ones take the same time
            report = deit_fast.quantize(self.model, mode.quantized_format, attention=mode.attention)
            self.skipped = skipped_layers(report)
        self.forward: Callable = self.model
        self.captured = bool(mode.compile) and compiled
        if self.captured:
            self.forward = torch.compile(self.model, mode=mode.compile, dynamic=False)
        self.compiled = compiled
        self.engine: deit_fast.InferenceEngine | None = None
        self._upstream: Tensor | None = None
        self._graph: _TrainingGraph | None = None
        self.optimizer: torch.optim.AdamW | None = None
        self.scaler: torch.amp.GradScaler | None = None
        if optimize:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=LEARNING_RATE, fused=True
            )
        if optimize and mode.autocast == torch.float16:
            # Random upstream gradients are in fp16's range as they are; the scaler's work is the
            # same at any scale
            self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1.0)

    def cast(self, images: Tensor) -> Tensor:
        """Images (batch, 3, height, width) in the mode's dtype and memory layout."""
        return images.to(self.mode.dtype, memory_format=self.layout)

    def __call__(self, images: Tensor) -> Tensor:
        """Run the mode on `images` as `cast` makes them; returns logits (batch, classes)."""
        if self.mode.engine and self.compiled:
            if self.engine is None or self.engine.batch_sizes != (len(images),):
                self.engine = None  # frees its memory
                height, width = images.shape[2:]
                self.engine = deit_fast.InferenceEngine(
                    self.model, len(images), image_size=(height, width), prepare=("float",)
                )
            return self.engine(images)
        images = images.to(self.device, non_blocking=True)
        if self.captured:
            torch.compiler.cudagraph_mark_step_begin()
        if not self.mode.train:
            # Float8 tensors of some torchao releases raise under inference_mode: pytorch/ao#3487
            no_gradients = torch.no_grad if self.mode.torchao else torch.inference_mode
            with no_gradients(), self._autocast():
                return self.forward(images)
        graphed = self.mode.graph and self.compiled
        logits = self._replay(images) if graphed else self.forward_backward(images)
        if self.optimizer is None:
            return logits
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return logits

    def forward_backward(self, images: Tensor) -> Tensor:
        """One eager or compiled forward and backward pass, from random upstream gradients.

        Returns:
            The logits; the gradients are the parameters' `grad`.
        """
        # Before the forward pass: gradients may lie in a CUDA graph's memory, which it reuses
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.forward(images)
        if self._upstream is None or self._upstream.shape != logits.shape:
            self._upstream = _random_upstream(logits)
        upstream = self._upstream
        logits.backward(upstream if self.scaler is None else self.scaler.scale(upstream))
        return logits.detach()

    def _replay(self, images: Tensor) -> Tensor:
        if self._graph is None or self._graph.images.shape != images.shape:
            self._graph = None  # frees its memory
            self._graph = _TrainingGraph(self, images)
        return self._graph.replay(images)

    def outputs(self, images: Tensor, copies: int = 1) -> list[Tensor]:
        """What is compared between modes: the logits, or the gradients of all parameters.

        Nothing is updated.

        Args:
            images: As `cast` makes them.
            copies: Of gradients, those of a batch that holds every image so many times.
        """
        if not self.mode.train:
            return [self(images).clone()]
        optimizer, scaler = self.optimizer, self.scaler
        self.optimizer = self.scaler = None
        logits = self(images)  # fixes the shape
        timed = self._upstream
        upstream = _random_upstream(logits.repeat(copies, 1))
        self._upstream = upstream.unflatten(0, (copies, -1)).sum(0)
        self(images)
        # each has one; where one were missing, this raises and the row fails
        grads = [p.grad.clone() for p in self.model.parameters()]  # type: ignore[union-attr]
        self._upstream, self.optimizer, self.scaler = timed, optimizer, scaler
        self.model.zero_grad(set_to_none=True)
        return grads

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.mode.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.mode.autocast)


class _TrainingGraph:
    """A step's forward and backward pass as one CUDA graph, with input buffers of its own."""

    def __init__(self, step: Step, images: Tensor):
        self.step, self.images = step, images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, fixes the shape of the upstream gradients
                step.forward_backward(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        step.model.zero_grad(set_to_none=True)  # the graph allocates its own
        given = step._upstream
        assert given is not None  # forward_backward made them
        step._upstream = self.upstream = given.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step.forward_backward(self.images)
        step._upstream = given
        self.gradients = [p.grad for p in step.model.parameters()]

    def replay(self, images: Tensor) -> Tensor:
        """Copy images and upstream gradients in, and replay; sets the parameters' `grad`."""
        self.images.copy_(images)
        # never None: __init__ made them
        self.upstream.copy_(self.step._upstream)  # type: ignore[arg-type]
        self.graph.replay()
        for p, gradient in zip(self.step.model.parameters(), self.gradients, strict=True):
            p.grad = gradient
        return self.logits


def skipped_layers(report: QuantizationReport) -> str | None:
    """The layers that `deit_fast.quantize` skipped, in one line; None where there are none."""
    reasons = Counter(f"{m.name.rpartition('.')[2]}: {m.reason}" for m in report.skipped)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"not in {report.format}: {listed}" if reasons else None


def _quantize_by_torchao(model: nn.Module) -> str | None:
    """Quantize every Linear that torchao takes, as its documentation does it.

    Weights and activations are float8 (e4m3) with dynamic per-row scales. Returns the Linears of
    the Blocks that torchao left, as `skipped_layers` does.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    skipped = Counter(
        name.rpartition(".")[2]
        for name, m in model.get_submodule("blocks").named_modules()
        if isinstance(m, nn.Linear) and type(m.weight.data) is Tensor
    )
    listed = ", ".join(f"{count} x {name}" for name, count in skipped.items())
    return f"not in fp8: {listed}" if skipped else None


def _random_upstream(logits: Tensor) -> Tensor:
    """Random upstream gradients, in place of a loss: the same for the same shape."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(logits.shape, generator=generator).to(logits)
