"""What is compared: one network in eager PyTorch, compiled, and in deit_fast, by precision; and
with its products in eight bits, ours beside torchao's.

Every mode is what a competent user would write: weights in the dtype of the arithmetic (autocast
excepted), inference_mode (torchao's: no_grad), SDPA free to choose its backend, cudnn.benchmark,
channels_last for convolutional networks wherever tensor cores take part (NCHW in plain fp32, as the
paper had it).
"""

import difflib
from collections.abc import Iterable
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
    train: bool = False  # forward + backward; an optimiser where the protocol has one
    eight_bits: str | None = None  # "fp8" or "int8": the products of every Block
    attention: bool = False  # those of attention too
    torchao: bool = False  # which quantises, instead of deit_fast

    @property
    def precision(self) -> str:
        """Of the matrix products: "fp32", "tf32", "fp16", "bf16", "fp8" or "int8"; a peak rate has
        the same name."""
        return self.eight_bits or self._precision

    @property
    def _precision(self):
        return "tf32" if self.tf32 else PRECISIONS[self.autocast or self.dtype]

    @property
    def eager(self) -> "Mode":
        """The eager mode of the same precision, of eight bits that of what is left of the model:
        what this one is compared with."""
        return MODES[f"eager_{'amp_' * bool(self.autocast)}{self._precision}{TRAIN * self.train}"]

    @contextmanager
    def settings(self):
        """PyTorch's global switches as this mode wants them, and as they were afterwards; torchao
        sets some of the compiler's when it quantises."""
        with _compiler_settings() if self.torchao else nullcontext(), self._switches():
            yield

    @contextmanager
    def _switches(self):
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
def _compiler_settings():
    """torch.compile's as they were, afterwards."""
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
    Mode("deit_fast_fp8", BF16, fast=True, eight_bits="fp8"),
    Mode("deit_fast_int8", BF16, fast=True, eight_bits="int8"),
    Mode("deit_fast_engine_fp8", BF16, fast=True, engine=True, eight_bits="fp8"),
    Mode("deit_fast_fp8_attention", BF16, fast=True, eight_bits="fp8", attention=True),
    # CUDA graphs and tuned products: the most that torch.compile makes of it
    Mode("torchao_fp8_compile", BF16, compile="max-autotune", eight_bits="fp8", torchao=True),
)
# Pure fp16 is missing: gradients and updates underflow without a scaler, nobody trains so. Graphs
# of a step are the optimiser's affair too.
_BACKWARD = tuple(
    replace(mode, name=mode.name + TRAIN, train=True)
    for mode in _FORWARD
    if mode.dtype != FP16
    and not mode.engine
    and not mode.eight_bits
    and mode.compile != "reduce-overhead"
)
# As people train: fp32 weights, products in bf16. In training alone: at inference the weights are
# cast once instead of at each call, which is what the modes in bf16 do. Ours also as CUDA graphs,
# which max-autotune has of itself: a step is hundreds of launches; by torch.compile or, without a
# compiler, captured as they are.
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
REFERENCE = MODES["eager_fp32"]  # outputs are compared with this one's


def pick(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """`names` in their order, each once. Raises ValueError that names the nearest known ones."""
    known, names = list(known), list(dict.fromkeys(names))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            wanted = f"did you mean {' or '.join(near)}?" if near else f"expected one of {known}"
            raise ValueError(f"{what}: unknown {name!r}, {wanted}")
    return names
