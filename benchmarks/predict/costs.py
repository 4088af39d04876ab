"""What one launch of a kernel costs: FLOPs, bytes, and the time that they should take."""

import math
from dataclasses import dataclass, replace

import torch

from deit_fast.bench.launches import Recorder

SMS, CLOCK_GHZ = 132, 1.75  # of an H100 SXM and an H200 alike; under load
# of the matrix peak rate, by K: filling and draining the pipeline weighs more when K is small
EFFICIENCY = {192: 0.50, 384: 0.62, 768: 0.72, 1536: 0.75, 3072: 0.78}
ATTENTION_EFFICIENCY = 0.5
COPY_EFFICIENCY = 0.9
LEAST_US = 2.0  # of any launch
# the ahead-of-time count of GELU: instructions and of them MUFU an element; 128 and 16 lanes
GELU_CYCLES = max(13 / 128, 2 / 16)
# of one element that a prologue normalises, and of its first pass where that makes the statistics
NORMALISE_CYCLES, STATISTICS_CYCLES = 6 / 128, 4 / 128
PROLOGUE_WIDTH = 64  # columns of a tile: each normalises its rows again
HIDDEN = 0.5


@dataclass(frozen=True)
class Launch:
    """One launch of an operation.

    Attributes:
        op: Name of the operation.
        shape: Its sizes, for a reader.
        flops: Floating-point operations of the matmuls.
        bytes: Bytes that must move.
        gelu: Elements that go through GELU.
        prologue: Cycles of one lane that normalise, over all tiles.
        k: Inner dimension of the GEMM; None where there is none.
        parts: Kernels that it consists of.
        rate: Multiple of the matrix peak rate: 2 with quantized operands.
    """

    op: str
    shape: str
    flops: int
    bytes: int
    gelu: int = 0
    prologue: float = 0.0
    k: int | None = None
    parts: int = 1
    rate: int = 1

    def times(self, peak_rates: dict) -> dict[str, float]:
        """Microseconds: "arithmetic", "traffic", "epilogue" and "predicted".

        The epilogue is its part that is not hidden, a prologue's with it.
        """
        efficiency = ATTENTION_EFFICIENCY if self.k is None else _efficiency(self.k / self.rate)
        peak_rate = self.rate * peak_rates["bf16_tflops"]
        found = {
            "arithmetic": self.flops / (efficiency * peak_rate) / 1e6,
            "traffic": self.bytes / (COPY_EFFICIENCY * peak_rates["copy_tb_per_s"]) / 1e6,
        }
        cycles = (self.gelu * GELU_CYCLES + self.prologue) * (1 - HIDDEN)
        found["epilogue"] = cycles / (SMS * CLOCK_GHZ * 1e3)
        total = max(found["arithmetic"], found["traffic"]) + found["epilogue"]
        return found | {"predicted": max(total, LEAST_US * self.parts)}


def _efficiency(k):
    """Linear in log K between the points of EFFICIENCY."""
    points = sorted(EFFICIENCY.items())
    if k <= points[0][0]:
        return points[0][1]
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if k <= high:
            return a + (b - a) * math.log(k / low) / math.log(high / low)
    return points[-1][1]


def _gemm(op, x, weight, others, out, activation, parts=1, extra=0, prologue=0.0):
    (M, K), N = x.shape, weight.shape[0]
    shape = f"{M} x {K} -> {N}" + (", gelu" if activation == "gelu" else "")
    moved = _nbytes(x, weight, *others, out) + extra
    return Launch(
        op, shape, 2 * M * N * K, moved, M * N * (activation == "gelu"), prologue, K, parts
    )  # fmt: skip


def _nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _linear(out, x, weight, bias, residual, layer_scale, row_scale, activation, emit, *_):
    y, row_stats, _ = out
    return _gemm(
        "linear", x, weight, (bias, residual, layer_scale, row_scale, row_stats), y, activation
    )


def _layer_norm_linear(out, x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation):
    extra = 2 * _nbytes(weight)  # read, folded, written
    extra += _nbytes(x) + 8 * x.shape[0] if row_stats is None else 0
    parts = 2 + (row_stats is None)
    return _gemm(
        "layer_norm_linear", x, weight, (bias, row_stats), out, activation, parts, extra
    )  # fmt: skip


def _layer_norm_linear_prologue(
    out, x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation
):  # fmt: skip
    cycles = NORMALISE_CYCLES + (STATISTICS_CYCLES if row_stats is None else 0)
    tiles = math.ceil(weight.shape[0] / PROLOGUE_WIDTH)
    return _gemm(
        "layer_norm_linear_prologue", x, weight, (norm_weight, norm_bias, bias, row_stats), out,
        activation, prologue=cycles * tiles * x.numel(),
    )  # fmt: skip


def _layer_norm_mlp(out, x, norm_weight, norm_bias, w1, b1, w2, b2, residual, eps, emit):
    M, D = x.shape
    hidden = w1.shape[0]
    return Launch(
        "layer_norm_mlp", f"{M} x {D}, hidden {hidden}, fused", 4 * M * D * hidden,
        _nbytes(x, w1, w2, residual, *out), M * hidden, k=D,
    )  # fmt: skip


def _quantized_linear(
    out, x, x_scales, weight, weight_scales, bias, residual, layer_scale, row_scale, out_scale,
    activation, dtype,
):  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    gelu = activation == "gelu"
    shape = f"{M} x {K} -> {N}, {_format(x)}" + ", gelu" * gelu
    others = (x_scales, weight_scales, bias, residual, layer_scale, row_scale)
    return Launch(
        "quantized_linear", shape, 2 * M * N * K, _nbytes(x, weight, *others, *out), M * N * gelu,
        k=K, rate=2,
    )  # fmt: skip


def _format(x):
    return "int8" if x.dtype == torch.int8 else "fp8"


def _quantize(out, x, *_):
    shape = f"{' x '.join(map(str, x.shape))}, {_format(out[0])}"
    return Launch("quantize", shape, 0, _nbytes(x, *out))


def _layer_norm_quantized(out, x, *_):
    return replace(_quantize(out, x), op="layer_norm_quantized")


def _attention_quantized(out, q, k, v, *_):
    quantized = q.element_size() == 1
    wide = _attention(out, q, k, v)
    shape = f"{wide.shape}, {_format(out[0])}" + " operands" * quantized
    return replace(wide, op="attention_quantized", shape=shape, rate=1 + quantized)


def _attention(out, q, k, v, *_):
    B, N, H, d = q.shape
    L = k.shape[1]
    flops, moved = 4 * B * H * N * L * d, _nbytes(q, k, v, *out)
    return Launch("attention", f"{B} x {H}, {N} of {L}", flops, moved)


def _talking_heads(out, qkv, *_):
    B, N, _, H, d = qkv.shape
    flops = 4 * B * H * N * N * (d + H)  # q k^T, a v; both mixtures
    return Launch("talking_heads", f"{B} x {H}, {N} of {N}", flops, _nbytes(qkv, *out))


def _layer_norm(out, x, residual, *_):
    return Launch("layer_norm", " x ".join(map(str, x.shape)), 0, _nbytes(x, residual, *out))


def _patch_embed(out, image, weight, *_):
    D, K = weight.shape[0], weight[0].numel()
    patches = image.numel() // K
    kind = "uint8" if image.dtype == torch.uint8 else "float"
    return Launch(
        "patch_embed", f"{patches} x {K} -> {D}, {kind}", 2 * patches * K * D,
        _nbytes(image, weight, out), k=K,
    )  # fmt: skip


def _classifier(out, x, norm_weight, norm_bias, w0, b0, w1, *_):
    B, _, D = x.shape
    heads = 1 if w1 is None else 2
    return Launch(
        "classifier", f"{B} x {D} -> {w0.shape[0]}", 2 * heads * B * D * w0.shape[0],
        2 * heads * B * D + _nbytes(w0, w1, out), k=D,
    )  # fmt: skip


_READ = {
    "linear": _linear, "layer_norm_linear": _layer_norm_linear,
    "layer_norm_linear_prologue": _layer_norm_linear_prologue, "layer_norm_mlp": _layer_norm_mlp,
    "attention": _attention, "layer_norm": _layer_norm, "patch_embed": _patch_embed,
    "classifier": _classifier, "talking_heads": _talking_heads,
    "quantized_linear": _quantized_linear, "quantize": _quantize,
    "layer_norm_quantized": _layer_norm_quantized, "attention_quantized": _attention_quantized,
}  # fmt: skip


def launches(recorder: Recorder) -> list[Launch]:
    """The recorded calls of deit_fast's operators, in order."""
    return [_READ[name](result, *args) for name, args, result in recorder.calls]
