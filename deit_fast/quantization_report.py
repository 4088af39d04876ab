"""How far a model in eight bits is from what it was made of.

    compare        logits, decisions and top-1, over any number of images
    layer_errors   each layer by itself, given what the original layer gets
    worst_layers   what each layer alone does to the logits, and what leaving it out would give

A relative error is |got - expected| / |expected|, of all elements together. What is wanted comes from the
model as it was, in fp32 if the error is to be all that eight bits (and a half-precision model
around them) cost. Both models are in eval mode.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import kernels
from .kernels.quantize import Quantized, quantize_statically_reference
from .kernels.quantized_linear import GROUP_SIZE
from .layers.quantized import undo
from .layers.quantized_linear import is_quantized, quantize_
from .quantization import _eager, quantize, quantized_layers

OUTLIERS_EVERY, OUTLIERS_TIMES = 37, 50  # as `stream="outliers"` in deit_fast.kernels.cases
_NORMS = {"qkv": "norm1", "fc1": "norm2"}  # whose result is the operand


@dataclass
class Comparison:
    """Two models over the same images. Shares are in percent, top-1 only with labels."""

    images: int
    logits_error: float
    agreement: float  # the same class first
    top1: float | None = None
    top1_quantized: float | None = None


@dataclass
class LayerErrors:
    """Relative error of one layer's output, by what its input was."""

    name: str
    images: float
    random: float
    outliers: float


@dataclass
class LayerShare:
    """Relative error of the logits with this layer alone in eight bits, and with all but it."""

    name: str
    alone: float
    without: float


@dataclass
class Shares:
    """Of every layer, the worst first; and the error with all of them."""

    together: float
    layers: list[LayerShare]


@torch.inference_mode()
def compare(model: nn.Module, quantized: nn.Module, batches: Iterable) -> Comparison:
    """Run both models over the same images.

    batches: images (B, C, H, W), normalised, or what else both models take; or tuples of them and
    labels (B,) int64, all or none. Each model gets them on its device, floats in its dtype.
    Raises ValueError without images and for a model in train mode, FloatingPointError where a logit
    is not finite.
    """
    _expect_eval(model=model, quantized=quantized)
    images = same = labelled = right = right_quantized = 0
    wrong = total = 0.0
    for batch in batches:
        x, labels = batch if isinstance(batch, tuple | list) else (batch, None)
        expected, got = _logits(model, x, "model"), _logits(quantized, x, "quantized")
        wrong += (got - expected).square().sum().item()
        total += expected.square().sum().item()
        classes, classes_quantized = expected.argmax(1), got.argmax(1)
        images += len(x)
        same += (classes == classes_quantized).sum().item()
        if labels is not None:
            labels = labels.cpu()
            labelled += len(labels)
            right += (classes == labels).sum().item()
            right_quantized += (classes_quantized == labels).sum().item()
    if not images:
        raise ValueError("batches: no images came, expected at least one")
    if not total:
        raise ValueError("model: every logit is 0, there is nothing to compare with")
    if labelled not in (0, images):
        raise ValueError(f"batches: labels for {labelled} of {images} images, expected all or none")
    top1 = (100 * n / images if labelled else None for n in (right, right_quantized))
    return Comparison(images, (wrong / total) ** 0.5, 100 * same / images, *top1)


@torch.inference_mode()
def layer_errors(
    model: nn.Module, quantized: nn.Module, images: Tensor, seed: int = 0
) -> list[LayerErrors]:
    """Each layer of `quantized` by itself, against the same layer of `model`.

    Both get the same input, which eight bits read as they do in the model: for qkv and fc1 the
    residual stream, with LayerNorm's scale for each row; for proj attention's result, for fc2
    GELU's, with the layer's one scale or those of its parts. The input is what `images` cause in
    `model`; or normal numbers, alike in all channels; or such with every 37th channel 50 times the
    others. A scale for all fits operands of the size it was made for, so both kinds of random ones
    have the rms that the images' have. Attention's own products, in fp8 where it was asked for, are
    no layer's.

    images: (B, C, H, W), normalised, run at once. Raises ValueError if nothing is in eight bits, or
    where the models do not fit each other.
    """
    _expect_eval(model=model, quantized=quantized)
    names, found, hooks = quantized_layers(quantized), {}, []
    if not names:
        raise ValueError("quantized: no layer is in eight bits, call deit_fast.quantize first")
    if quantized_layers(model):
        raise ValueError("model: is in eight bits, expected it as it was before deit_fast.quantize")
    layers = dict(model.named_modules())
    if missing := [name for name in names if name not in layers]:
        raise ValueError(f"model: has no layer {missing[0]}, expected what quantized was made of")

    def hook(name, block, part):
        def measure(module, args):
            inputs = {"images": args[0], **_random_like(args[0], seed)}
            ours = quantized.get_submodule(block)
            errors = {}
            for kind, x in inputs.items():
                expected = _plain(layers[block], part, x)
                got = _in_eight_bits(ours, part, x)
                errors[kind] = _relative_error(got, expected)
            found[name] = LayerErrors(name, **errors)

        return measure

    with _eager(model):
        try:
            for name in names:
                *block, _, part = name.split(".")
                block = ".".join(block)
                # LayerNorm's input is the stream; the other operands are the layer's own inputs
                where = f"{block}.{_NORMS[part]}".lstrip(".") if part in _NORMS else name
                where = layers[where]
                hooks.append(where.register_forward_pre_hook(hook(name, block, part)))
            model(_for(model, images))
        finally:
            for handle in hooks:
                handle.remove()
    return [found[name] for name in names]


def worst_layers(
    model: nn.Module,
    format: str,
    images: Tensor,
    calibration: Tensor | Iterable | None = None,
    exclude: Iterable[str] = (),
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Shares:
    """The layers by what they do to the logits of `images`: each alone in eight bits, and all but
    it. fc2 by itself, as wherever fc1 is excluded, has a scale for each row and not one for all.

    model: as `deit_fast.quantize` takes it, which is left as it was; so are format, calibration,
    exclude, and the errors. images: (B, C, H, W), normalised. progress: is told how many passes
    over them are done, of how many.
    """
    _expect_eval(model=model)
    split = images.split(batch_size)
    if not len(images):
        raise ValueError("images: none, expected at least one")

    @torch.inference_mode()
    def logits():
        return torch.cat([_logits(model, x, "model") for x in split])

    expected = logits()
    report = quantize(model, format, calibration, exclude)
    try:
        layers = {name: model.get_submodule(name) for name in report.quantized}
        scales = {name: layer.input_scale for name, layer in layers.items()}
        done, total = 0, 1 + 2 * len(layers)

        def error():
            nonlocal done
            value, done = _relative_error(logits(), expected), done + 1
            if progress is not None:
                progress(done, total)
            return value

        together, without, alone = error(), {}, {}
        for name, layer in layers.items():
            layer.restore()
            without[name] = error()
            quantize_(layer, format, scales[name])
        for layer in layers.values():
            layer.restore()
        for name, layer in layers.items():
            quantize_(layer, format, scales[name])
            alone[name] = error()
            layer.restore()
    finally:
        undo(model)
    shares = [LayerShare(name, alone[name], without[name]) for name in layers]
    return Shares(together, sorted(shares, key=lambda share: -share.alone))


def _expect_eval(**models):
    for name, model in models.items():
        if model.training:
            raise ValueError(f"{name}: in train mode, expected {name}.eval()")


def _for(model, images):
    like = next(model.parameters())
    return images.to(like.device, like.dtype if images.is_floating_point() else None)


def _logits(model, images, name) -> Tensor:
    """(B, classes) in fp64 on the CPU."""
    logits = model(_for(model, images)).double().cpu()
    if not logits.isfinite().all():
        raise FloatingPointError(f"{name}: logits that are not finite, in {len(images)} images")
    return logits


def _relative_error(got, expected) -> float:
    expected = expected.double()
    got = got.to(expected)
    return ((got - expected).norm() / expected.norm()).item()


def _random_like(x, seed) -> dict[str, Tensor]:
    """Random inputs with the rms of x; drawn on the CPU, so that every device has the same."""
    rms = x.double().square().mean().sqrt()
    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    outliers = normal.clone()
    outliers[..., ::OUTLIERS_EVERY] *= OUTLIERS_TIMES
    drawn = {"random": normal, "outliers": outliers}
    return {k: (v * (rms.cpu() / v.square().mean().sqrt())).to(x) for k, v in drawn.items()}


def _parts(block, part):
    """LayerNorm or None, and the Linear."""
    norm = getattr(block, _NORMS[part]) if part in _NORMS else None
    return norm, getattr(block.attn if part in ("qkv", "proj") else block.mlp, part)


def _plain(block, part, x):
    norm, linear = _parts(block, part)
    return linear.forward(x if norm is None else norm.forward(x))  # without their hooks


def _in_eight_bits(block, part, x):
    norm, linear = _parts(block, part)
    x, backend = x.to(block.norm1.weight), block.attn.backend
    if norm is not None:
        weight, bias, eps = norm.operands
        operand = kernels.layer_norm_quantized(x, weight, bias, eps, linear.format, backend)
    else:
        operand = _operand(block, part, linear, x, backend)
    return linear.project(operand, x, backend=backend)


def _operand(block, part, linear, x, backend) -> Quantized:
    """Attention's or GELU's result as its producer writes it."""
    if part == "fc2" and not is_quantized(block.mlp.fc1):  # which then writes no eight bits
        return kernels.quantize(x, linear.format, implementation=backend)
    if linear.input_scale is not None:
        return quantize_statically_reference(x, linear.input_scale)
    parts = block.attn.num_heads if part == "proj" else x.shape[-1] // GROUP_SIZE
    return kernels.quantize(x, linear.format, parts, backend)
