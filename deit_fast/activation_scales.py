"""Static per-tensor scales of activations in FP8: which layers need one, and how it is found.

No program of attention's or fc1's kernel holds a whole row of its result, so the kernel can't
compute a scale per row. The scale is therefore fixed beforehand, in one of two ways:

    calibrated       from the largest value over images
    bound-derived    from the weights: a normalized row has a length of at most sqrt(D), which
                     bounds what a feature after it can become (Cauchy-Schwarz inequality). e4m3 has
                     the same relative precision over most of its range, so a wide bound costs
                     little, and nothing saturates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._model_config import data_config
from .kernels.quantize import FORMATS, LIMITS, TINY, dequantize, quantize_reference
from .layers import Attention, Block, Mlp

# Headroom above the largest value seen, for images that were not; and above the bound, which is for
# exact arithmetic
CALIBRATION_MARGIN, BOUND_MARGIN = 2.0, 1.02

Layers = Mapping[str, tuple[Block, str]]  # name -> (its Block, "qkv", "proj", "fc1" or "fc2")


def static_layers(names: Iterable[str], attention: bool) -> list[str]:
    """Find which quantized layers have a static per-tensor scale.

    These are proj, and each fc2 whose fc1 is quantized too (after an fc1 that is not, a separate
    kernel quantizes, which has whole rows). With FP8 attention also qkv, for its result.

    Args:
        names: The layers to quantize.
        attention: Whether attention runs in FP8, where qkv and proj are both quantized.

    Returns:
        Those of the names, grouped as fc2, proj, qkv.
    """
    names = set(names)
    hidden = [n for n in names if n.endswith("fc2") and f"{n[:-1]}1" in names]
    proj = [n for n in names if n.endswith("proj")]
    qkv = [n for n in names if attention and n.endswith("qkv") and f"{n[:-3]}proj" in names]
    return hidden + proj + qkv


def bound_derived(layers: Layers, attention: bool) -> dict[str, Tensor]:
    """Derive the scales from the weights.

    Args:
        layers: What `static_layers` chose.
        attention: Whether attention runs in FP8.

    Returns:
        Of each layer a scale, (1, 1) in fp32.

    Raises:
        ValueError: If a scale is not finite.
    """
    bounds = {name: _bound(*place, attention) for name, place in layers.items()}
    return _scales(bounds, BOUND_MARGIN)


def calibrated(
    model: nn.Module, layers: Layers, images: Tensor | Iterable
) -> tuple[dict[str, Tensor], int]:
    """Measure the scales on images.

    Args:
        model: The accelerated model, not yet quantized. It is left as it was.
        layers: What `static_layers` chose.
        images: See `deit_fast.quantize`.

    Returns:
        Of each layer a scale, (1, 1) in fp32; and the number of images.

    Raises:
        TypeError: For images of another type or dtype.
        ValueError: For images of another shape, for none, and if a scale is not finite.
    """
    largest, count = _largest_values(model, layers, images)
    return _scales(largest, CALIBRATION_MARGIN), count


def _scales(largest: dict[str, Tensor], margin: float) -> dict[str, Tensor]:
    scales = {
        name: (value.float() * margin / LIMITS[FORMATS["fp8"]]).clamp_min(TINY).view(1, 1)
        for name, value in largest.items()
    }
    for name, scale in scales.items():
        if not scale.is_meta and not scale.isfinite():
            raise ValueError(f"model: the scale of {name} would be {scale.item()}")
    return scales


@torch.no_grad()
def _bound(block: Block, part: str, attention: bool) -> Tensor:
    """Bound an element of the input of "proj" or "fc2", or of the result of "qkv".

    A feature is w x + b of x = LayerNorm's xhat * g + h, and xhat has a mean of 0 and a length of
    at most sqrt(D). w is the quantized weight; e4m3 rounds an element of x by at most 1/16 of it,
    or by half a step of its smallest numbers.
    """
    norm, linear = block.norm2, block.mlp.fc1
    if part != "fc2":
        norm, linear = block.norm1, block.attn.qkv
    w, bias = linear.weight.float(), linear.bias
    bias = w.new_zeros(len(w)) if bias is None else bias.float()
    if part == "proj":  # attention's result is a weighted mean of the values v
        values = len(w) // 3
        w, bias = w[-values:], bias[-values:]
    w = dequantize(quantize_reference(w, "fp8"))
    g, h, length = norm.weight.float(), norm.bias.float(), w.shape[1] ** 0.5
    wg = w * g
    centre, reach = w @ h + bias, length * (wg - wg.mean(1, keepdim=True)).norm(dim=1)
    rounding = (length * wg.norm(dim=1) + w.abs() @ h.abs()) / 16
    rounding += w.abs().sum(1) * (length * g.abs() + h.abs()).max() / 448 * 2**-10
    if part == "fc2":
        return (centre + reach + rounding).max().clamp_min(0.17)  # GELU's minimum is -0.17
    # the softmax weights and v are rounded too
    more = (17 / 16) ** 2 if part == "proj" and attention else 1.0
    return more * (centre.abs() + reach + rounding).max()


@torch.inference_mode()
def _largest_values(
    model: nn.Module, layers: Iterable[str], calibration: Tensor | Iterable
) -> tuple[dict[str, Tensor], int]:
    """Return the largest absolute value of each layer's input (of qkv: result), and the images."""
    largest: dict[str, Tensor] = {}
    images = 0

    def hook(name: str) -> Callable:
        def record(module, args, result):
            x = result if name.endswith("qkv") else args[0]
            seen = x.abs().amax().float()
            largest[name] = torch.maximum(largest.get(name, seen), seen)

        return record

    with unfused_blocks(model):
        hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
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
            what = "result" if name.endswith("qkv") else "input"
            raise ValueError(f"calibration: the {what} of {name} became {value.item()}")
    return largest, images


@contextmanager
def unfused_blocks(model: nn.Module) -> Iterator[None]:
    """Run Blocks as timm does, so that hooks on the layers inside are called; in eval mode."""
    training = {m: m.training for m in model.modules()}
    fused: dict[nn.Module, Any] = {
        m: type(m) for m in model.modules() if type(m) in (Block, Attention, Mlp)
    }
    try:
        model.eval()
        for module, kind in fused.items():
            module.__class__ = kind.timm_class
        yield
    finally:
        for module, kind in fused.items():
            module.__class__ = kind
        for module, mode in training.items():
            module.training = mode


def _batches(model: nn.Module, calibration: Tensor | Iterable) -> Iterator[Tensor]:
    """Yield images in the model's dtype and on its device, a few at a time."""
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
        channels_last = images.dtype == torch.uint8
        if not channels_last and not images.is_floating_point():
            raise TypeError(f"calibration: images in {images.dtype}, expected floats or uint8")
        expected = (*size, C) if channels_last else (C, *size)
        shape = tuple(images.shape[1:])
        if getattr(model, "dynamic_img_size", False) and len(shape) == 3:
            expected = (*shape[:2], C) if channels_last else (C, *shape[1:])
        if images.dim() != 4 or shape != expected:
            raise ValueError(
                f"calibration: images of shape {tuple(images.shape)} in {images.dtype}, expected "
                f"(B, {', '.join(map(str, expected))})"
            )
        if len(images):
            yield images.to(like.device, images.dtype if channels_last else like.dtype)
