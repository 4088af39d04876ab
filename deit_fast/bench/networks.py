"""A network with its weights: every mode of it, whether it agrees, how much fits, one measured row.

Weights are random: speed does not depend on them, and nothing needs a network connection. They are
drawn so that every part matters for the output, which is what agreement is checked on.
"""

import contextlib
import copy
import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from timm.models import Cait, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deit_fast
from deit_fast.models import NAMES

from .modes import MODES, REFERENCE, TRAIN, Mode, pick
from .results import ModelRow
from .timing import (
    capability,
    has_bf16,
    latency_ms,
    latency_runs,
    release,
    rotation,
    summary,
    throughput_ms,
    why_no_products,
)

DISTINCT = 8  # at most so many different images make a batch, each as often as any other
# Relative errors that PyTorch's own lower precisions may have against fp32, on these weights (seen
# over Table 5: fp16 6e-3, bf16 5e-2); more for gradients through batch norm, where rounding flips
# many a ReLU (seen: fp16 0.1, bf16 0.3)
TOLERANCE = {"fp32": 1e-4, "tf32": 0.02, "fp16": 0.02, "bf16": 0.1}
# Of eight bits PyTorch has no eager mode to go by. Twice the most that was seen, on a CPU: DeiT-Ti,
# S, B and B-384, ViT-B and DeiT-III-S, weights and stream in bf16, gave 0.053 to 0.065 in fp8, by
# deit_fast as by torchao, and 0.016 to 0.020 in int8. Both are held to the same.
TOLERANCE |= {"fp8": 0.13, "int8": 0.04}
TRANSFORMERS = (VisionTransformer, Cait)
PROTOCOLS = ("batch", "paper", "latency", "host", "step")
PAPER_SECONDS = 3.0  # of timed calls: in fp32 a batch of 2048 takes seconds
LEARNING_RATE = 1e-5  # timed steps are real: weights drift, so little that nothing overflows


class Disagreement(RuntimeError):
    """A mode's outputs are not the network's."""


class TooSlow(RuntimeError):
    """The timed calls would take longer than the plan has."""


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random: no zero bias and no unit LayerNorm that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise, leaf = torch.randn(p.shape, generator=generator), name.rpartition(".")[2]
        if p.dim() < 2 and (leaf == "weight" or leaf.startswith("gamma")):
            p.data.copy_(1 + 0.2 * noise)
        elif p.dim() > 1 and "token" not in leaf and "pos" not in leaf:
            p.data.copy_(noise / p[0].numel() ** 0.5)
        else:
            p.data.copy_(0.3 * noise)
    return model


def random_images(batch: int, size: int, device: torch.device, seed: int = 1) -> Tensor:
    """fp32 (batch, 3, size, size), normalised."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, device=device)


@dataclass(frozen=True)
class Plan:
    """How a row is measured."""

    protocol: str = "batch"
    batch: int = 256  # "paper": the cap of the search
    runs: int = 30
    warmup: int = 10
    seconds: float = float("inf")  # that the timed calls may take


class Network:
    """A timm network at one image size, with random weights that all its modes share.

    name: ours or timm's. Raises ValueError for an unknown network or an image size that does not
    fit it, naming the nearest valid ones; and where DEIT_FAST_BACKEND would make deit_fast's modes
    something else than their names say.
    """

    def __init__(
        self, name: str, image_size: int | None, device: torch.device, label: str = "",
        options: dict | None = None,
    ):  # fmt: skip
        if os.environ.get("DEIT_FAST_BACKEND"):
            raise ValueError(
                "DEIT_FAST_BACKEND is set, expected it unset: a mode runs what it names"
            )
        self.device, self.label = device, label or name
        self.timm_name, self.image_size = check_network(name, image_size)
        self.images = random_images(DISTINCT, self.image_size, device)
        self.model = randomize(self._create(options or {})).eval().to(device)
        self.transformer = isinstance(self.model, TRANSFORMERS)
        self.batch_norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        self._calibrate()
        self._errors, self._references = {}, {}
        blank = copy.deepcopy(self.model).to("meta")
        self.flops = _count(blank, self.image_size)
        self.why_not_fast = _why_not_fast(blank)
        self.blocks = sum(type(m) is deit_fast.layers.Block for m in blank.modules())

    def _create(self, options):
        size = {"img_size": self.image_size} if _patch(self.timm_name) else {}
        # TinyViT's come with the 21,841 classes that they were distilled on
        return timm.create_model(self.timm_name, num_classes=1000, **size, **options)

    def _calibrate(self):
        """Batch norm gets the statistics of random images, so that activations stay in range, and
        residual branches a small gain: with gain 1, a deep random network amplifies rounding a
        hundredfold, and nothing agrees with anything."""
        for m in self.model.modules():
            if hasattr(m, "zero_init_last"):  # ResNet, RegNet
                m.zero_init_last()
            elif getattr(m, "has_skip", False):  # EfficientNet
                nn.init.zeros_(getattr(m, "bn3", m.bn2).weight)
        for m in self.batch_norms:
            if not m.weight.any():
                nn.init.constant_(m.weight, 0.2)
            m.reset_running_stats()
            m.momentum = None  # the mean over what it sees
        if self.batch_norms:
            with torch.no_grad():
                self.model.train()(random_images(4, min(self.image_size, 224), self.device, 2))
            self.model.eval()
        for m in self.batch_norms:
            m.momentum = 0.1

    def why_not(self, mode: Mode) -> str | None:
        """Why the network has no such mode, or None."""
        if mode.fast and self.why_not_fast:
            return self.why_not_fast
        if mode.eight_bits and (missing := self._why_not_eight_bits(mode)):
            return missing
        if mode.tf32 and (self.device.type == "cpu" or capability(self.device) < (8, 0)):
            return "TF32 needs a GPU of compute capability 8.0"
        if mode.graph and self.device.type == "cpu":
            return "a CUDA graph needs a CUDA device"
        if mode.engine and self.device.type == "cpu":
            return "an engine has its graphs on a CUDA device"
        if torch.bfloat16 in (mode.dtype, mode.autocast) and not has_bf16(self.device):
            return "the GPU has no bf16 arithmetic"
        return None

    def _why_not_eight_bits(self, mode):
        if not self.blocks:
            return "it has no Block of a ViT or DeiT"
        if not mode.torchao:
            return why_no_products(
                mode.eight_bits, None if self.device.type == "cpu" else capability(self.device)
            )
        if not importlib.util.find_spec("torchao"):
            return "torchao is not installed"
        if self.device.type == "cpu" or capability(self.device) < (8, 9):
            return "torchao's float8 needs a GPU of compute capability 8.9"
        return None

    def channels_last(self, mode: Mode) -> bool:
        return not self.transformer and mode.precision != "fp32"

    def step(self, mode: Mode, compiled: bool = True, optimize: bool = False) -> "Step":
        return Step(self, mode, compiled, optimize)

    def batch(self, batch: int) -> Tensor:
        """fp32 (batch, 3, image_size, image_size): a few different images, each equally often, so
        that every image of a batch of any size can be checked against a small reference, batch
        norm or not."""
        return self.images[: _distinct(batch)].repeat(batch // _distinct(batch), 1, 1, 1)

    def error(self, step: "Step", batch: int) -> float:
        """Relative error against eager fp32 of all logits of a batch, or of all parameters'
        gradients where the step trains."""
        got = step.outputs(step.cast(self.batch(batch)))
        expected = self._reference(step.mode.train, batch)
        if not step.mode.train:
            expected = [w.repeat(batch // len(w), 1) for w in expected]
        total = sum((w.double().norm() ** 2).item() for w in expected)
        difference = sum(
            ((g.double() - w.double()).norm() ** 2).item()
            for g, w in zip(got, expected, strict=True)
        )
        return (difference / total) ** 0.5

    def check(self, step: "Step", batch: int) -> float:
        """The relative error; raises Disagreement where it is not at most twice that of the eager
        mode of the same precision, or, for that mode itself and for eight bits, above what the
        precision explains."""
        mode = step.mode
        error = self.error(step, batch)
        allowed = TOLERANCE[mode.precision] * (8 if mode.train and self.batch_norms else 1)
        if mode.eager != mode and not mode.eight_bits:
            allowed = min(allowed, 2 * self._eager_error(mode.eager) + 1e-4)
        if not error <= allowed:  # NaN too
            raise Disagreement(
                f"relative error {error:.1e} against eager fp32, allowed {allowed:.1e}"
            )
        return error

    def check_update(self, step: "Step", images: Tensor) -> None:
        """Raises Disagreement where a first update does not move every parameter against its
        gradient. Leaves the step as it was made: the network's weights, which gradients can be
        compared on, and no optimiser state.

        Whether the gradients are right is `check`'s affair: AdamW's first update is their sign, so
        that rounding turns elements near zero about, and updated weights compare badly."""
        self._reset(step)
        (group,) = step.optimizer.param_groups
        group["lr"] = 0.1  # enough for weights in bf16
        step(images)
        group["lr"] = LEARNING_RATE
        pairs = zip(step.model.named_parameters(), self.model.parameters(), strict=True)
        with torch.no_grad():
            wrong = [
                name
                for (name, p), old in pairs
                if p.grad is None or not ((old.to(p) - p).float() * p.grad.float()).sum() > 0
            ]
        if wrong:
            raise Disagreement(f"the optimiser leaves {', '.join(wrong)} unmoved or turned")
        self._reset(step)

    def _reset(self, step):
        step.optimizer.state.clear()
        with torch.no_grad():
            for p, old in zip(step.model.parameters(), self.model.parameters(), strict=True):
                p.copy_(old)

    def _reference(self, train, batch):
        """What eager fp32 makes of the different images of a batch: their logits; or the gradients
        of the whole batch, whose upstream gradients are summed over the copies of each image."""
        distinct = _distinct(batch)
        key = (train, batch if train else distinct)
        if key not in self._references:
            step = self.step(MODES[REFERENCE.name + TRAIN * train])
            with step.mode.settings():
                expected = step.outputs(self.batch(distinct), batch // distinct)
            self._references[key] = [w.cpu() for w in expected]
        return [w.to(self.device) for w in self._references[key]]

    def _eager_error(self, mode):
        if mode not in self._errors:
            with mode.settings():
                self._errors[mode] = self.error(self.step(mode), DISTINCT)
        return self._errors[mode]

    def measure(
        self, mode: Mode, plan: Plan, peak_rates: dict, stamp: dict
    ) -> tuple[ModelRow, list[float]]:
        """One row and its single times, ms. A mode that disagrees, does not run or is not to be
        had here gives a row that says so, and no times.

        stamp: the row's `commit` and `build`. A batch too large for memory is halved. Raises
        ValueError where the protocol has an optimiser and the mode does not train."""
        if plan.protocol == "step" and not mode.train:
            raise ValueError(
                f"mode: {mode.name} by protocol step, expected one that ends in {TRAIN}"
            )
        row = {
            "network": self.label, "timm_name": self.timm_name, "image_size": self.image_size,
            "mode": mode.name, "protocol": plan.protocol, "asked_batch": plan.batch,
            "runs": plan.runs, "channels_last": self.channels_last(mode), **stamp,
        }  # fmt: skip
        missing = self.why_not(mode)
        if missing:
            return ModelRow(**row, batch=plan.batch, status="unavailable", note=missing), []
        with mode.settings():
            batch, note = plan.batch, None
            while True:
                try:
                    if plan.protocol == "paper" and note is None:
                        batch, note = self.largest_batch(mode, plan.batch)
                    times, figures = self._timed(mode, batch, plan)
                    break
                except torch.OutOfMemoryError:
                    note = f"batch {batch} does not fit in memory"
                except TooSlow:
                    raise
                except Exception as error:  # a baseline that does not run is a finding
                    note = LOST * device_is_lost(error) + reason(error)
                    return ModelRow(**row, batch=batch, status="failed", note=note), []
                finally:
                    self._tidy()
                if batch == 1:
                    return ModelRow(**row, batch=1, status="failed", note=note), []
                batch //= 2
        fewer = f"{len(times)} calls timed" if len(times) < plan.runs else None
        note = "; ".join(filter(None, (note, figures.pop("left"), fewer))) or None
        figures |= summary(times)
        images_per_s = 1e3 * batch / figures["ms_mean" if plan.protocol == "paper" else "ms_median"]
        tflops = images_per_s * self.flops * (3 if mode.train else 1) / 1e12
        peak_rate = peak_rates.get(f"{mode.precision}_tflops")
        return ModelRow(
            **row, **figures, batch=batch, note=note, images_per_s=images_per_s, tflops=tflops,
            fraction_of_peak_rate=tflops / peak_rate if peak_rate else None,
        ), times  # fmt: skip

    def _timed(self, mode, batch, plan):
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        step = self.step(mode, optimize=plan.protocol == "step")
        images = step.cast(self.batch(batch))
        step(images)  # compiles, captures, makes the optimiser's state
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        step(images)  # torch.compile records its graph; from here on it is what will be timed
        # the step's own: without the network that it was copied from
        peak = (torch.cuda.max_memory_allocated(self.device) - before) / 1e9 if cuda else None
        if step.engine is not None:  # what its graphs hold counts as free between their runs
            peak += step.engine.memory.workspace / 1e9
        if step.optimizer is not None:
            self.check_update(step, images)
        error = self.check(step, batch)
        (one,) = latency_ms(step, [images], 1, 0, self.device)
        if one * (plan.warmup + plan.runs) > 1e3 * plan.seconds:
            raise TooSlow(f"{one / 1e3:.1f} s a call, {plan.seconds:.0f} s left")
        nbytes = images.nbytes
        del images  # the largest batch that fits leaves no room for another

        def make():
            images = step.cast(self.batch(batch))
            on_host = plan.protocol == "host" and self.device.type == "cuda"
            return images.cpu().pin_memory() if on_host else images

        inputs = rotation(make, nbytes, self.device)
        clock = latency_ms if plan.protocol == "latency" else throughput_ms
        times = clock(step, inputs, _runs(plan, one), plan.warmup, self.device)
        return times, {"relative_error": error, "peak_memory_gb": peak, "left": step.left}

    def _tidy(self):
        torch.compiler.reset()
        with contextlib.suppress(RuntimeError):  # a device that is lost stays lost
            release(self.device)

    def largest_batch(self, mode: Mode, cap: int) -> tuple[int, str]:
        """The largest power of two, or `cap` itself, that one uncompiled step fits in memory with;
        and what ended the search. By doubling from 1."""
        batch, fits = 1, 0
        step = self.step(mode, compiled=False)
        while fits < cap:
            batch = min(batch, cap)
            if not self._fits(step, batch):
                return max(fits, 1), f"largest that fits: {batch} does not"
            fits, batch = batch, 2 * batch
        return fits, f"capped at {cap}"

    def _fits(self, step, batch):
        try:
            step(step.cast(self.batch(batch)))
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        step.model.zero_grad(set_to_none=True)
        release(self.device)  # outside the handler: its traceback holds the step's tensors
        return fits


def _runs(plan, ms):
    """Timed calls, of a call that lasts `ms`: of the paper's protocol PAPER_SECONDS' worth."""
    if plan.protocol == "latency":
        return latency_runs(ms, plan.runs)
    if plan.protocol == "paper":
        return max(min(plan.runs, 5), min(plan.runs, round(1e3 * PAPER_SECONDS / max(ms, 1e-3))))
    return plan.runs


class Step:
    """One call of a network in one mode: forward; forward and backward; or, with `optimize`, a full
    step: AdamW, fused, after them, through a GradScaler under fp16 autocast.

    left: of a mode in eight bits, which layers of the Blocks are not, and why; or None."""

    def __init__(self, network: Network, mode: Mode, compiled: bool = True, optimize: bool = False):
        self.mode, self.device = mode, network.device
        self.model = copy.deepcopy(network.model)
        if mode.fast:
            deit_fast.accelerate(self.model)
        layout = torch.channels_last if network.channels_last(mode) else torch.contiguous_format
        self.layout = layout
        self.model.to(mode.dtype).to(memory_format=layout).train(mode.train)
        self.left = None
        if mode.torchao:
            self.left = _quantize_by_torchao(self.model)
        elif mode.eight_bits:  # scales from the bound: measured ones take the same time
            report = deit_fast.quantize(self.model, mode.eight_bits, attention=mode.attention)
            self.left = _left(report)
        self.forward: Callable = self.model
        self.captured = bool(mode.compile) and compiled
        if self.captured:
            self.forward = torch.compile(self.model, mode=mode.compile, dynamic=False)
        self.compiled, self.engine = compiled, None
        self._upstream, self._graph = None, None
        self.optimizer, self.scaler = None, None
        if optimize:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=LEARNING_RATE, fused=True
            )
        if optimize and mode.autocast == torch.float16:
            # Random upstream gradients are in fp16's range as they are; the scaler's work is the
            # same at any scale
            self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1.0)

    def cast(self, images: Tensor) -> Tensor:
        return images.to(self.mode.dtype, memory_format=self.layout)

    def __call__(self, images: Tensor) -> Tensor:
        if self.mode.engine and self.compiled:
            if self.engine is None or self.engine.batch_sizes != (len(images),):
                self.engine = None  # gives its memory back
                size = tuple(images.shape[2:])
                self.engine = deit_fast.InferenceEngine(
                    self.model, len(images), image_size=size, prepare=("float",)
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
        logits = self._replayed(images) if graphed else self._gradients(images)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer is not None:
            self.optimizer.step()
        return logits

    def _gradients(self, images):
        # Before the forward pass: gradients may lie in a CUDA graph's memory, which the pass reuses
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.forward(images)
        if self._upstream is None or self._upstream.shape != logits.shape:
            self._upstream = _upstream(logits)
        wanted = self._upstream
        logits.backward(wanted if self.scaler is None else self.scaler.scale(wanted))
        return logits.detach()

    def _replayed(self, images):
        if self._graph is None or self._graph.images.shape != images.shape:
            self._graph = None  # gives its memory back
            self._graph = _Graph(self, images)
        return self._graph.replay(images)

    def outputs(self, images: Tensor, copies: int = 1) -> list[Tensor]:
        """What agreement is about: the logits, or all parameters' gradients. copies: as if the
        batch held every image so many times. Nothing is updated."""
        if not self.mode.train:
            return [self(images).clone()]
        optimizer, scaler = self.optimizer, self.scaler
        self.optimizer = self.scaler = None
        logits = self(images)  # fixes the shape
        timed = self._upstream
        wanted = _upstream(logits.repeat(copies, 1))
        self._upstream = wanted.unflatten(0, (copies, -1)).sum(0)
        self(images)
        grads = [p.grad.clone() for p in self.model.parameters()]
        self._upstream, self.optimizer, self.scaler = timed, optimizer, scaler
        self.model.zero_grad(set_to_none=True)
        return grads

    def _autocast(self):
        if self.mode.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.mode.autocast)


class _Graph:
    """A step's forward and backward pass as one CUDA graph over buffers of its own."""

    def __init__(self, step, images):
        self.step, self.images = step, images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, fixes the shape of the upstream gradients
                step._gradients(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        step.model.zero_grad(set_to_none=True)  # the graph allocates its own
        given = step._upstream
        step._upstream = self.upstream = given.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step._gradients(self.images)
        step._upstream = given
        self.gradients = [p.grad for p in step.model.parameters()]

    def replay(self, images):
        self.images.copy_(images)
        self.upstream.copy_(self.step._upstream)
        self.graph.replay()
        for p, gradient in zip(self.step.model.parameters(), self.gradients, strict=True):
            p.grad = gradient
        return self.logits


def _left(report):
    """The layers that stayed in bf16, in one line; None where none did."""
    reasons = Counter(f"{m.name.rpartition('.')[2]}: {m.reason}" for m in report.skipped)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"not in {report.format}: {listed}" if reasons else None


def _quantize_by_torchao(model):
    """float8 (e4m3) of weights and activations, dynamic, a scale a row, in every Linear that
    torchao takes, as its documentation has it. Those of the Blocks that it left, as `_left`."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    left = Counter(
        name.rpartition(".")[2]
        for name, m in model.blocks.named_modules()
        if isinstance(m, nn.Linear) and type(m.weight.data) is Tensor
    )
    listed = ", ".join(f"{count} x {name}" for name, count in left.items())
    return f"not in fp8: {listed}" if left else None


def _upstream(logits):
    """Random upstream gradients, in place of a loss: the same for the same shape."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(logits.shape, generator=generator).to(logits)


def _distinct(batch):
    """How many different images make up a batch: the largest divisor up to DISTINCT."""
    return max(n for n in range(1, DISTINCT + 1) if batch % n == 0)


LOST = "device lost: "  # begins the note of a row after which the process can measure nothing
_LOST = (
    "triton error [cuda]", "cuda error", "illegal memory access", "misaligned address",
    "unspecified launch failure", "execution_failed", "execution failed", "device-side assert",
    "illegal instruction", "ecc error",
)  # fmt: skip
_USABLE = ("out of memory", "out of resource", "invalid configuration", "no kernel image")


def device_is_lost(error: BaseException) -> bool:
    """Whether the process can do no more on its device: every call after such an error fails, and
    says so of the wrong one. Another process can."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    text = str(error).lower()
    return (
        isinstance(error, RuntimeError)
        and any(part in text for part in _LOST)
        and not any(part in text for part in _USABLE)
    )


def reason(error: Exception) -> str:
    """An exception as one line of a row's note."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


@functools.cache
def _patch(timm_name):
    """The side of a vision transformer's patches; 0 for networks of any image size."""
    if not timm.models.is_model_in_modules(timm_name, ("vision_transformer", "deit", "cait")):
        return 0  # and timm cannot build every network without memory
    with torch.device("meta"):
        model = timm.create_model(timm_name)
    return model.patch_embed.patch_size[0] if isinstance(model, TRANSFORMERS) else 0


def _count(model, image_size):
    """FLOPs of one image's forward pass: convolutions and matrix products, two a multiply-add."""
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    model.requires_grad_(False)  # the counter trips over views of parameters: CaiT's class token
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return counter.get_total_flops()


def _why_not_fast(model):
    try:
        deit_fast.accelerate(model)
    except ValueError:
        return "deit_fast has no modules for it"


def check_network(name: str, image_size: int | None) -> tuple[str, int]:
    """(timm's name, image size in pixels; None: the one the network was made for). Raises
    ValueError for a network that timm does not have and a size that the network cannot take."""
    known = {*NAMES, *timm.list_models()}
    (name,) = pick("network", [name.split(".")[0]], sorted(known))
    timm_name = NAMES.get(name, name)
    patch = _patch(timm_name)
    if image_size is None:
        size = timm.get_pretrained_cfg(timm_name).input_size[-1]
        return timm_name, size
    smallest = patch or 32
    if image_size < smallest or (patch and image_size % patch):
        near = max(smallest, image_size - image_size % (patch or 1))
        valid = f"{near} or {near + patch}" if patch else f"{smallest} or more"
        raise ValueError(f"image size: {image_size} for {timm_name}, nearest valid: {valid}")
    return timm_name, image_size
