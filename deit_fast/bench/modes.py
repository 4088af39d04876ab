"""What is compared: a network in eager PyTorch, compiled, and in deit_fast, by precision.

With quantized matmuls, ours are compared with torchao's.

Every mode is what a competent user would write: weights in the dtype of the arithmetic (autocast
excepted), inference_mode (torchao's: no_grad), SDPA free to choose its backend, cudnn.benchmark,
channels_last for convolutional networks wherever tensor cores take part (NCHW in plain fp32, as in
the paper).
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
PRECISIONS = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}
TRAIN = "_train"


@dataclass(frozen=True)
class Mode:
    """One way to run a network."""

    name: str
    dtype: torch.dtype = FP32  # of weights and images
    tf32: bool = False
    autocast: torch.dtype | None = None
    compile: str | None = None  # torch.compile's mode
    fast: bool = False  # through deit_fast.accelerate
    engine: bool = False  # through InferenceEngine: a CUDA graph, as max-autotune has its own
    graph: bool = False  # forward and backward captured together, as one CUDA graph
    train: bool = False  # forward and backward; an optimizer step where the protocol has one
    quantized_format: str | None = None  # "fp8" or "int8": the matmuls of every Block
    attention: bool = False  # attention's matmuls are quantized too
    torchao: bool = False  # torchao quantizes, instead of deit_fast

    @property
    def precision(self) -> str:
        """The precision of the matmuls: "fp32", "tf32", "fp16", "bf16", "fp8" or "int8".

        The chip's peak rate has the same name.
        """
        return self.quantized_format or self._precision

    @property
    def _precision(self) -> str:
        return "tf32" if self.tf32 else PRECISIONS[self.autocast or self.dtype]

    @property
    def eager(self) -> "Mode":
        """The eager mode that this one is compared with.

        It has the same precision; for a quantized mode, that of the layers that are not quantized.
        """
        return MODES[f"eager_{'amp_' * bool(self.autocast)}{self._precision}{TRAIN * self.train}"]

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Set PyTorch's global switches for this mode, and restore them afterwards.

        Those of torch.compile that torchao sets when it quantizes are restored too.
        """
        with _compiler_settings() if self.torchao else nullcontext(), self._switches():
            yield

    @contextmanager
    def _switches(self) -> Iterator[None]:
        cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
        before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = self.tf32, True, False
        try:
            yield
        finally:
            cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
            torch.set_float32_matmul_precision(precision)


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """Restore torch.compile's settings afterwards."""
    from torch._inductor import config  # takes a second

    before = config.get_config_copy()
    try:
        yield
    finally:
        for name, value in config.get_config_copy().items():
            if value != before[name]:
                setattr(config, name, before[name])


_FORWARD = (
    Mode("eager_fp32"),  # the paper's
    Mode("eager_tf32", tf32=True),
    Mode("eager_amp_fp16", autocast=FP16),
    Mode("eager_fp16", FP16),
    Mode("eager_bf16", BF16),
    Mode("compile_bf16", BF16, compile="default"),
    Mode("compile_reduce_overhead_bf16", BF16, compile="reduce-overhead"),
    Mode("compile_max_autotune_bf16", BF16, compile="max-autotune"),
    Mode("deit_fast_fp32", fast=True),
    Mode("deit_fast_fp16", FP16, fast=True),
    Mode("deit_fast_bf16", BF16, fast=True),
    Mode("deit_fast_engine_bf16", BF16, fast=True, engine=True),
    Mode("deit_fast_fp8", BF16, fast=True, quantized_format="fp8"),
    Mode("deit_fast_int8", BF16, fast=True, quantized_format="int8"),
    Mode("deit_fast_engine_fp8", BF16, fast=True, engine=True, quantized_format="fp8"),
    Mode("deit_fast_fp8_attention", BF16, fast=True, quantized_format="fp8", attention=True),
    # with CUDA graphs and autotuned GEMMs, the fastest that torch.compile offers
    Mode("torchao_fp8_compile", BF16, compile="max-autotune", quantized_format="fp8", torchao=True),
)
# Pure fp16 is missing: gradients and updates underflow without a scaler, and nobody trains so.
# reduce-overhead is missing: CUDA graphs of a training step are among the mixed modes below.
_BACKWARD = tuple(
    replace(mode, name=mode.name + TRAIN, train=True)
    for mode in _FORWARD
    if mode.dtype != FP16
    and not mode.engine
    and not mode.quantized_format
    and mode.compile != "reduce-overhead"
)
# How people train: fp32 weights, matmuls in bf16. For training only: at inference the weights are
# cast once instead of at each call, which is what the bf16 modes do. deit_fast also with CUDA
# graphs, which max-autotune uses by default: a step is hundreds of launches. They come from
# torch.compile ("reduce_overhead") or, without a compiler, from a capture of the eager step
# ("graph").
_MIXED = tuple(
    Mode(f"{name}_amp_bf16{TRAIN}", autocast=BF16, compile=compiler, fast=fast, train=True)
    for name, compiler, fast in (
        ("eager", None, False),
        ("compile", "default", False),
        ("compile_max_autotune", "max-autotune", False),
        ("deit_fast", None, True),
        ("deit_fast_reduce_overhead", "reduce-overhead", True),
    )
)
_GRAPH = Mode(f"deit_fast_graph_amp_bf16{TRAIN}", autocast=BF16, fast=True, graph=True, train=True)
MODES = {mode.name: mode for mode in (*_FORWARD, *_BACKWARD, *_MIXED, _GRAPH)}
REFERENCE = MODES["eager_fp32"]  # every mode's outputs are compared with this one's


def pick(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return `names` in their order, each once.

    Args:
        what: What the names are, for the error.
        names: The names that were given.
        known: All valid names.

    Raises:
        ValueError: A name is unknown; the message suggests the nearest known ones.
    """
    known, names = list(known), list(dict.fromkeys(names))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            wanted = f"did you mean {' or '.join(near)}?" if near else f"expected one of {known}"
            raise ValueError(f"{what}: unknown {name!r}, {wanted}")
    return names
