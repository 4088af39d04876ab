"""quantize(model) puts the four products of every Block in eight bits, fp8 or int8.

Weights get a scale for each output feature. Their operands are quantised where they are made, with
a scale for each row from LayerNorm. Of attention's and GELU's results no program sees a whole row:

    fp8    one scale for all, from images (`calibration`), or without any from a bound: a row that
           LayerNorm normalised has a length of sqrt(D), so what a feature behind it can become is
           known from the weights (Cauchy and Schwarz). e4m3 is as fine far below its largest number
           as near it: a wide bound costs little, and nothing saturates.
    int8   a scale for each row and head, or each row and 64 features of GELU's.

Patch embedding, LayerNorm's arithmetic, attention itself unless it is asked for, residual stream
and heads stay as they are.
"""

import difflib
import fnmatch
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .engine import data_config
from .kernels import _checks, _chips, _policy
from .kernels.quantize import FORMATS, LIMITS, TINY, dequantize, quantize_reference
from .layers import Attention, Block, Mlp
from .layers.quantized import QuantizedAttention, QuantizedMlp, undo, why_not
from .layers.quantized_linear import is_quantized, quantize_
from .swap import Skipped

PARTS = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}
# How far a scale reaches above the largest value seen: images that were not. And above the bound,
# which knows nothing of half precision.
MARGIN_SEEN, MARGIN_BOUND = 2.0, 1.02


@dataclass
class QuantizationReport:
    """What `quantize` did. Names are those of `named_modules()`."""

    format: str
    scales: str  # where those of attention's and GELU's results come from
    attention: int = 0  # Blocks whose attention is in fp8 too
    quantized: list[str] = field(default_factory=list)
    left: list[Skipped] = field(default_factory=list)

    def __str__(self):
        lines = [f"{self.format}: {len(self.quantized)} layers, scales {self.scales}"]
        lines += [f"attention in fp8: {self.attention} blocks"] if self.attention else []
        lines += [f"left: {m.name} ({m.kind}): {m.reason}" for m in self.left]
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    format: str = "fp8",
    calibration: Tensor | Iterable | None = None,
    exclude: Iterable[str] = (),
    attention: bool = False,
) -> QuantizationReport:
    """Put qkv, proj, fc1 and fc2 of every Block of an accelerated model in eight bits, in place,
    for inference. `deit_fast.restore(model)` undoes this and the swap.

    model: one that `deit_fast.accelerate` has swapped, with Blocks (ViT, DeiT, DeiT-III), in fp32,
    fp16 or bf16, on any device. `format`: "fp8" (e4m3, from compute capability 8.9) or "int8" (from
    8.0); on a CPU PyTorch computes both, slowly. calibration, for fp8: images (B, C, H, W),
    normalised, or uint8 (B, H, W, C), or an iterable of such batches, alone or first in a tuple
    with labels; int8 takes none, each row brings its scales. exclude: names of layers that stay as
    they are, "blocks.0.attn.qkv", or patterns, "blocks.11.*". attention, for fp8: attention's own
    two products in fp8 as well, where qkv and proj are; q, k and v have one scale.

    The weights are buffers from then on, `weight` in eight bits and `weight_scale`, with
    `input_scale` and `output_scale` where there is one scale for all; all are in the `state_dict`.
    What they were stays in the host's memory for `restore`.

    Raises ValueError for names, images and models that do not fit, TypeError for other dtypes,
    RuntimeError where the model's chip has no such numbers. Nothing is changed if it raises.
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
        raise ValueError("calibration: int8 has a scale for each row, expected None")
    if format == "int8" and attention:
        raise ValueError("attention: int8 has no such products, expected False")
    report, chosen = QuantizationReport(format, "by row"), {}
    for name, (block, part) in layers.items():
        reason = why_not(block, part, format)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            reason = "excluded"
        if reason is None:
            chosen[name] = block, part
            report.quantized.append(name)
        else:
            report.left.append(Skipped(name, type(model.get_submodule(name)).__name__, reason))
    if not chosen:
        raise ValueError(f"model: no layer is left to quantise\n{report}")
    _check_weights(model, chosen)
    scales = {}
    if format == "fp8":
        static = {name: chosen[name] for name in _static(chosen, attention)}
        report.attention = sum(name.endswith("qkv") for name in static)
        if attention and not report.attention:
            raise ValueError(f"attention: in no block qkv and proj are both quantised\n{report}")
        if not static:
            largest, margin = {}, 1.0
        elif calibration is None:
            largest = {name: _bound(*place, attention) for name, place in static.items()}
            margin, report.scales = MARGIN_BOUND, "from a bound"
        else:
            largest, images = _observe(model, static, calibration)
            margin, report.scales = MARGIN_SEEN, f"from {images} images"
        scales = {
            name: (value.float() * margin / LIMITS[FORMATS[format]]).clamp_min(TINY).view(1, 1)
            for name, value in largest.items()
        }
        for name, scale in scales.items():
            if not scale.is_meta and not scale.isfinite():
                raise ValueError(f"model: the scale of {name} would be {scale.item()}")
    _swap(model, chosen, format, scales)
    return report


def _swap(model, chosen, format, scales):
    """scales: of operands, and of qkv's result."""
    try:
        for name, (block, part) in chosen.items():
            kind = "output_scale" if part == "qkv" else "input_scale"
            linear = model.get_submodule(name)
            quantize_(linear, format, **{kind: scales.get(name)})
            linear.backend = block.attn.backend
            block.attn.__class__, block.mlp.__class__ = QuantizedAttention, QuantizedMlp
    except BaseException:  # no memory for the next one
        undo(model)
        raise


def prepare(model: nn.Module, format: str, names: Iterable[str], attention: bool = False) -> None:
    """Make these layers of an accelerated model ready for a `state_dict` in eight bits. Raises
    ValueError for names and formats that do not fit."""
    layers, names = _layers(model, format), list(names)
    for name in names:
        if name not in layers:
            raise ValueError(f"quantized: no layer {name!r} in {type(model).__name__}")
    like = next(iter(layers.values()))[0].norm1.weight
    for name in names:
        if reason := why_not(*layers[name], format):
            raise ValueError(f"quantized: {name} {reason}")
    static = _static(names, attention) if format == "fp8" else []
    scales = {name: like.new_ones(1, 1, dtype=torch.float32) for name in static}
    _swap(model, {name: layers[name] for name in names}, format, scales)
    for name in names:
        model.get_submodule(name).forget()


def attends_in_eight_bits(model: nn.Module) -> bool:
    """Whether `model` was quantised with attention=True."""
    return any(is_quantized(m) and m.output_scale is not None for m in model.modules())


def quantized_layers(model: nn.Module) -> dict[str, str]:
    """Names of the layers in eight bits, and their format."""
    return {name: m.format for name, m in model.named_modules() if is_quantized(m)}


def _layers(model, format) -> dict[str, tuple[Block, str]]:
    """Name -> (its Block, "qkv", "proj", "fc1" or "fc2") of a model that can be quantised."""
    if format not in FORMATS:
        raise ValueError(f"format: {format!r}, expected one of {tuple(FORMATS)}")
    kind = type(model).__name__
    modules = dict(model.named_modules())
    if any(is_quantized(m) for m in modules.values()):
        raise ValueError(
            f"model: {kind} is in eight bits already, call deit_fast.restore and accelerate first"
        )
    blocks = {name: m for name, m in modules.items() if type(m) is Block}
    if not blocks:
        timms = any(type(m) is Block.timm_class for m in modules.values())
        if timms:
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
            f"model: {kind} is on a chip of {capability[0]}.{capability[1]}: {choice.reason}"
        )
    return layers


def _static(names, attention) -> list[str]:
    """Of layers in fp8 those whose operand gets one scale: it comes from where no program has a
    whole row. Behind an fc1 that stays as it is a pass of its own has. And the qkv whose result
    gets one, for attention in fp8."""
    names = set(names)
    hidden = [n for n in names if n.endswith("fc2") and f"{n[:-1]}1" in names]
    proj = [n for n in names if n.endswith("proj")]
    qkv = [n for n in names if attention and n.endswith("qkv") and f"{n[:-3]}proj" in names]
    return hidden + proj + qkv


def _check_weights(model, names):
    for name in names:
        for which, t in model.get_submodule(name).named_parameters():
            if not t.is_meta and not t.isfinite().all():
                raise ValueError(f"model: {name}.{which} has values that are not finite")


@torch.no_grad()
def _bound(block, part, attention) -> Tensor:
    """The largest that an element of the operand of "proj" or "fc2", or of qkv's result, can
    become: a feature is w x + b of x = LayerNorm's xhat * g + h, and xhat has a mean of 0 and a
    length of at most sqrt(D). w is the weight in eight bits; e4m3 rounds an element of x by 1/16 of
    it at most, or by half a step of its smallest numbers."""
    norm, linear = block.norm2, block.mlp.fc1
    if part != "fc2":
        norm, linear = block.norm1, block.attn.qkv
    w, bias = linear.weight.float(), linear.bias
    bias = w.new_zeros(len(w)) if bias is None else bias.float()
    if part == "proj":  # a mean of values
        values = len(w) // 3
        w, bias = w[-values:], bias[-values:]
    w = dequantize(quantize_reference(w, "fp8"))
    g, h, length = norm.weight.float(), norm.bias.float(), w.shape[1] ** 0.5
    wg = w * g
    centre, reach = w @ h + bias, length * (wg - wg.mean(1, keepdim=True)).norm(dim=1)
    rounding = (length * wg.norm(dim=1) + w.abs() @ h.abs()) / 16
    rounding += w.abs().sum(1) * (length * g.abs() + h.abs()).max() / 448 * 2**-10
    if part == "fc2":
        return (centre + reach + rounding).max().clamp_min(0.17)  # GELU's go down to -0.17
    # softmax's numbers and the values are then rounded too
    more = (17 / 16) ** 2 if part == "proj" and attention else 1.0
    return more * (centre.abs() + reach + rounding).max()


@torch.inference_mode()
def _observe(model, static, calibration) -> tuple[dict[str, Tensor], int]:
    """The largest element of each operand, or of qkv's result, over all images; how many these
    were."""
    largest, images = {}, 0

    def hook(name):
        def look(module, args, result):
            x = result if name.endswith("qkv") else args[0]
            seen = x.abs().amax().float()
            largest[name] = torch.maximum(largest.get(name, seen), seen)

        return look

    with _eager(model):
        hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in static]
        try:
            for batch in _batches(model, calibration):
                model(batch)
                images += len(batch)
        finally:
            for handle in hooks:
                handle.remove()
    if not images:
        raise ValueError("calibration: no images came, expected at least one")
    for name, value in largest.items():
        if not value.isfinite():
            what = "result" if name.endswith("qkv") else "operand"
            raise ValueError(f"calibration: the {what} of {name} became {value.item()}")
    return largest, images


@contextmanager
def _eager(model):
    """Blocks as timm computes them, so that the layers inside are called; in eval mode."""
    training = {m: m.training for m in model.modules()}
    swapped = {m: type(m) for m in model.modules() if type(m) in (Block, Attention, Mlp)}
    try:
        model.eval()
        for module in swapped:
            module.__class__ = module.timm_class
        yield
    finally:
        for module, kind in swapped.items():
            module.__class__ = kind
        for module, mode in training.items():
            module.training = mode


def _batches(model, calibration):
    """Images in the model's dtype and on its device, a few at a time."""
    if isinstance(calibration, Tensor):
        calibration = calibration.split(64) if calibration.dim() == 4 else [calibration]
    elif not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration: {type(calibration).__name__}, expected images or an iterable of batches"
        )
    like = next(model.parameters())
    C, *size = data_config(model)["input_size"]
    for batch in calibration:
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(images, Tensor):
            raise TypeError(f"calibration: a batch is a {type(images).__name__}, expected a tensor")
        bytewise = images.dtype == torch.uint8
        if not bytewise and not images.is_floating_point():
            raise TypeError(f"calibration: images in {images.dtype}, expected floats or uint8")
        wanted = (*size, C) if bytewise else (C, *size)
        sizes = tuple(images.shape[1:])
        if getattr(model, "dynamic_img_size", False) and len(sizes) == 3:
            wanted = (*sizes[:2], C) if bytewise else (C, *sizes[1:])
        if images.dim() != 4 or sizes != wanted:
            raise ValueError(
                f"calibration: images of shape {tuple(images.shape)} in {images.dtype}, expected "
                f"(B, {', '.join(map(str, wanted))})"
            )
        if len(images):
            yield images.to(like.device, images.dtype if bytewise else like.dtype)
