"""quantize(model): qkv, proj, fc1 and fc2 of every Block as FP8 (e4m3) or INT8 GEMMs.

A weight has a scale per output feature. The kernel that produces an activation quantizes it:

    qkv, fc1     LayerNorm, with a per-row scale
    proj, fc2    attention and fc1's GELU: in FP8 with a static per-tensor scale, calibrated on
                 images or bound-derived (`activation_scales.py`); in INT8 with per-group scales, a
                 group being a row's features of one head, or 64 features of GELU's result

Patch embedding, LayerNorm's arithmetic, attention (unless asked for), the residual stream and the
heads keep the model's dtype.
"""

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import activation_scales
from .activation_scales import static_layers
from .kernels import _checks, _chips, _policy
from .kernels.quantize import FORMATS
from .layers import Block
from .layers.quantized import QuantizedAttention, QuantizedMlp, undo, why_not
from .layers.quantized_linear import QuantizedLinear, is_quantized, quantize_
from .swap import Skipped

PARTS = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}


@dataclass
class QuantizationReport:
    """What `quantize` did. Names are those of `named_modules()`.

    Attributes:
        format: "fp8" or "int8".
        scales: Of the activations that proj and fc2 read: "dynamic", "static, bound-derived" or
            "static, calibrated on N images".
        attention: The number of Blocks whose attention runs in FP8 too.
        quantized: The quantized layers.
        skipped: The other layers of the Blocks, each with the reason.
    """

    format: str
    scales: str
    attention: int = 0
    quantized: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __str__(self):
        lines = [f"{self.format}: {len(self.quantized)} layers, activation scales {self.scales}"]
        lines += [f"attention in fp8: {self.attention} blocks"] if self.attention else []
        lines += [f"skipped: {m.name} ({m.kind}): {m.reason}" for m in self.skipped]
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    format: str = "fp8",
    calibration: Tensor | Iterable | None = None,
    exclude: Iterable[str] = (),
    attention: bool = False,
) -> QuantizationReport:
    """Quantize qkv, proj, fc1 and fc2 of every Block of an accelerated model, in place.

    The model is then for inference only. `deit_fast.restore(model)` undoes this and `accelerate`.
    The weights become buffers: `weight` in the format's dtype and `weight_scale`, with
    `input_scale` or `output_scale` where there is a static per-tensor scale; all are in the
    `state_dict`. The original weights stay in host memory for `restore`.

    Args:
        model: A model from `deit_fast.accelerate` with Blocks (ViT, DeiT, DeiT-III), in fp32, fp16
            or bf16, on any device.
        format: "fp8" (e4m3, from compute capability 8.9) or "int8" (from 8.0). On a CPU PyTorch
            computes both, slowly.
        calibration: For fp8: images (B, C, H, W), normalized, or uint8 (B, H, W, C), or an iterable
            of such batches, alone or first in a tuple with labels. None: the scales are
            bound-derived. int8 takes none: its scales are dynamic.
        exclude: Layers to skip: names, "blocks.0.attn.qkv", or patterns, "blocks.11.*".
        attention: For fp8: run attention's two matmuls in FP8 as well, in Blocks whose qkv and proj
            are quantized; q, k and v share a static per-tensor scale.

    Returns:
        What was quantized, what was skipped, and why.

    Raises:
        ValueError: For names, images and models that do not fit.
        TypeError: For other dtypes.
        RuntimeError: If the model's GPU does not support the format. Whatever is raised, the model
            is unchanged.
    """
    layers = _layers(model, format)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in exclude:
        if not fnmatch.filter(layers, pattern):
            some = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.0)
            raise ValueError(
                f"exclude: {pattern!r} is none of the {len(layers)} layers, expected such as "
                f"{', '.join(some)}"
            )
    if format == "int8" and calibration is not None:
        raise ValueError("calibration: int8 has dynamic activation scales, expected None")
    if format == "int8" and attention:
        raise ValueError("attention: there is no int8 attention, expected False")
    report = QuantizationReport(format, "dynamic")
    chosen: dict[str, tuple[Block, str]] = {}
    for name, (block, part) in layers.items():
        reason = why_not(block, part, format)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            reason = "excluded"
        if reason is None:
            chosen[name] = block, part
            report.quantized.append(name)
        else:
            report.skipped.append(Skipped(name, type(model.get_submodule(name)).__name__, reason))
    if not chosen:
        raise ValueError(f"model: no layer can be quantized\n{report}")
    _check_weights(model, chosen)
    scales: dict[str, Tensor] = {}
    if format == "fp8":
        static = {name: chosen[name] for name in static_layers(chosen, attention)}
        report.attention = sum(name.endswith("qkv") for name in static)
        if attention and not report.attention:
            raise ValueError(f"attention: in no block are qkv and proj both quantized\n{report}")
        if static and calibration is not None:
            scales, images = activation_scales.calibrated(model, static, calibration)
            report.scales = f"static, calibrated on {images} images"
        elif static:
            scales = activation_scales.bound_derived(static, attention)
            report.scales = "static, bound-derived"
    _convert(model, chosen, format, scales)
    return report


def convert_for_loading(
    model: nn.Module, format: str, names: Iterable[str], attention: bool = False
) -> None:
    """Convert layers of an accelerated model, so that it can load a quantized `state_dict`.

    Args:
        model: As `quantize` takes it.
        format: "fp8" or "int8".
        names: The layers that the `state_dict` has quantized.
        attention: Whether it was quantized with attention=True.

    Raises:
        ValueError: For names and formats that do not fit.
    """
    layers, names = _layers(model, format), list(names)
    for name in names:
        if name not in layers:
            raise ValueError(f"quantized: no layer {name!r} in {type(model).__name__}")
    like = next(iter(layers.values()))[0].norm1.weight
    for name in names:
        if reason := why_not(*layers[name], format):
            raise ValueError(f"quantized: {name} {reason}")
    static = static_layers(names, attention) if format == "fp8" else []
    scales = {name: like.new_ones(1, 1, dtype=torch.float32) for name in static}
    _convert(model, {name: layers[name] for name in names}, format, scales)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        layer.forget()


def has_fp8_attention(model: nn.Module) -> bool:
    """Return whether `model` was quantized with attention=True."""
    return any(is_quantized(m) and m.output_scale is not None for m in model.modules())


def quantized_layers(model: nn.Module) -> dict[str, str]:
    """Return the names of the quantized layers, and the format of each."""
    return {name: m.format for name, m in model.named_modules() if is_quantized(m)}


def _layers(model: nn.Module, format: str) -> dict[str, tuple[Block, str]]:
    """Return the layers of a model that can be quantized: name -> (its Block, "qkv", ...)."""
    if format not in FORMATS:
        raise ValueError(f"format: {format!r}, expected one of {tuple(FORMATS)}")
    kind = type(model).__name__
    modules = dict(model.named_modules())
    if any(is_quantized(m) for m in modules.values()):
        raise ValueError(
            f"model: {kind} is quantized already, call deit_fast.restore and accelerate first"
        )
    blocks = {name: m for name, m in modules.items() if type(m) is Block}
    if not blocks:
        if any(type(m) is Block.timm_class for m in modules.values()):
            raise ValueError(f"model: {kind} has timm's blocks, call deit_fast.accelerate first")
        raise ValueError(f"model: {kind} has no Block of a ViT or DeiT")
    layers = {
        ".".join(filter(None, (name, part, layer))): (block, layer)
        for name, block in blocks.items()
        for part, names in PARTS.items()
        for layer in names
    }
    norm = next(iter(blocks.values())).norm1.weight
    if norm.dtype not in _checks.DTYPES:
        raise TypeError(f"model: {kind} is in {norm.dtype}, expected float32, float16 or bfloat16")
    capability = _chips.capability(norm.device.type, norm.device.index)
    choice = _policy.choose("quantized_linear", capability, FORMATS[format])
    if choice.implementation == "none":
        raise RuntimeError(
            f"model: {kind} is on a GPU of compute capability {capability[0]}.{capability[1]}: "
            f"{choice.reason}"
        )
    return layers


def _check_weights(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        for which, t in model.get_submodule(name).named_parameters():
            if not t.is_meta and not t.isfinite().all():
                raise ValueError(f"model: {name}.{which} has values that are not finite")


def _convert(
    model: nn.Module, chosen: activation_scales.Layers, format: str, scales: dict[str, Tensor]
) -> None:
    """Quantize the chosen layers; `scales` are of their inputs, and of qkv's result."""
    try:
        for name, (block, part) in chosen.items():
            kind = "output_scale" if part == "qkv" else "input_scale"
            linear: Any = model.get_submodule(name)
            quantize_(linear, format, **{kind: scales.get(name)})
            linear.backend = block.attn.backend
            block.attn.__class__, block.mlp.__class__ = QuantizedAttention, QuantizedMlp
    except BaseException:  # such as no memory for the next layer
        undo(model)
        raise
