"""How far a quantized model is from the model it was made from.

    compare        logits, predicted classes and top-1, over any number of images
    layer_errors   each layer alone, given what the original layer reads
    worst_layers   what each layer alone does to the logits, and what excluding it would give

A relative error is |got - expected| / |expected|, of all elements together. The expected values are
the original model's: with that in fp32 the error is all that quantization (and a half-precision
model around it) costs. Both models are in eval mode.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import kernels
from .activation_scales import unfused_blocks
from .kernels.quantize import Quantized, quantize_statically_reference
from .kernels.quantized_linear import GROUP_SIZE
from .layers.quantized import undo
from .layers.quantized_linear import QuantizedLinear, is_quantized, quantize_
from .quantization import quantize, quantized_layers

OUTLIERS_EVERY, OUTLIERS_TIMES = 37, 50  # as `distribution="outliers"` in deit_fast.kernels.cases
_NORMS = {"qkv": "norm1", "fc1": "norm2"}  # the LayerNorm before each


@dataclass
class Comparison:
    """Two models over the same images. Shares are in percent, top-1 only with labels.

    Attributes:
        images: How many there were.
        logits_error: Relative error of the quantized model's logits.
        agreement: Share of images for which both models predict the same class.
        top1: Accuracy of the original model, or None.
        top1_quantized: Accuracy of the quantized model, or None.
    """

    images: int
    logits_error: float
    agreement: float
    top1: float | None = None
    top1_quantized: float | None = None


@dataclass
class LayerErrors:
    """Relative error of one layer's output, for each kind of input.

    Attributes:
        name: The layer.
        images: With what images cause in the model.
        random: With normally distributed values.
        outliers: With normally distributed values, some channels scaled up.
    """

    name: str
    images: float
    random: float
    outliers: float


@dataclass
class LayerShare:
    """Relative error of the logits with this layer alone quantized, and with all but it."""

    name: str
    alone: float
    without: float


@dataclass
class Shares:
    """The share of every layer, the worst first; and the error with all of them quantized."""

    together: float
    layers: list[LayerShare]


@torch.inference_mode()
def compare(model: nn.Module, quantized: nn.Module, batches: Iterable) -> Comparison:
    """Run both models over the same images.

    Args:
        model: The original model, in eval mode.
        quantized: The quantized model, in eval mode.
        batches: Images (B, C, H, W), normalized, or what else both models take; or tuples of them
            and labels (B,) int64, all or none. Each model gets them on its device, floats in its
            dtype.

    Returns:
        Errors and agreement.

    Raises:
        ValueError: Without images, and for a model in train mode.
        FloatingPointError: If a logit is not finite.
    """
    _expect_eval(model=model, quantized=quantized)
    images = same = labelled = 0
    correct = correct_quantized = 0.0
    wrong = total = 0.0
    for batch in batches:
        x, labels = batch if isinstance(batch, tuple | list) else (batch, None)
        expected, got = _logits(model, x, "model"), _logits(quantized, x, "quantized")
        wrong += (got - expected).square().sum().item()
        total += expected.square().sum().item()
        classes, classes_quantized = expected.argmax(1), got.argmax(1)
        images += len(x)
        same += int((classes == classes_quantized).sum())
        if labels is not None:
            labels = labels.cpu()
            labelled += len(labels)
            correct += (classes == labels).sum().item()
            correct_quantized += (classes_quantized == labels).sum().item()
    if not images:
        raise ValueError("batches: no images came, expected at least one")
    if not total:
        raise ValueError("model: every logit is 0, there is nothing to compare with")
    if labelled not in (0, images):
        raise ValueError(f"batches: labels for {labelled} of {images} images, expected all or none")
    top1 = (100 * n / images if labelled else None for n in (correct, correct_quantized))
    return Comparison(images, (wrong / total) ** 0.5, 100 * same / images, *top1)


@torch.inference_mode()
def layer_errors(
    model: nn.Module, quantized: nn.Module, images: Tensor, seed: int = 0
) -> list[LayerErrors]:
    """Compare each layer of `quantized`, alone, with the same layer of `model`.

    Both get the same input, quantized as in the model: for qkv and fc1 the residual stream, with
    LayerNorm's per-row scales; for proj attention's result and for fc2 GELU's, with the layer's
    static per-tensor scale or per-group scales. The input is what `images` cause in `model`; or
    normally distributed values, alike in all channels; or such with every 37th channel 50 times the
    others. A static scale fits inputs of the magnitude it was made for, so both random inputs have
    the rms of the images' input. Attention's matmuls, in FP8 or not, belong to no layer.

    Args:
        model: The original model, in eval mode.
        quantized: The quantized model, in eval mode.
        images: (B, C, H, W), normalized, run as one batch.
        seed: Of the random inputs.

    Returns:
        The errors of every quantized layer.

    Raises:
        ValueError: If nothing is quantized, or the models do not fit each other.
    """
    _expect_eval(model=model, quantized=quantized)
    names = quantized_layers(quantized)
    found: dict[str, LayerErrors] = {}
    hooks = []
    if not names:
        raise ValueError("quantized: no layer is quantized, call deit_fast.quantize first")
    if quantized_layers(model):
        raise ValueError("model: is quantized, expected it as it was before deit_fast.quantize")
    layers = dict(model.named_modules())
    if missing := [name for name in names if name not in layers]:
        raise ValueError(f"model: has no layer {missing[0]}, expected the original of quantized")

    def hook(name: str, block: str, part: str) -> Callable:
        def measure(module, args):
            inputs = {"images": args[0], **_random_like(args[0], seed)}
            ours = quantized.get_submodule(block)
            errors = {}
            for kind, x in inputs.items():
                expected = _original_output(layers[block], part, x)
                got = _quantized_output(ours, part, x)
                errors[kind] = _relative_error(got, expected)
            found[name] = LayerErrors(name, **errors)

        return measure

    with unfused_blocks(model):
        try:
            for name in names:
                *parents, _, part = name.split(".")
                block = ".".join(parents)
                # qkv and fc1 with their LayerNorm, whose input is the residual stream
                where = f"{block}.{_NORMS[part]}".lstrip(".") if part in _NORMS else name
                hooks.append(layers[where].register_forward_pre_hook(hook(name, block, part)))
            model(_on_device_of(model, images))
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
    """Rank the layers by what they do to the logits of `images`.

    Each layer is quantized alone, then all but it. fc2 alone, as wherever fc1 is excluded, has a
    dynamic per-row scale and no static one.

    Args:
        model: As `deit_fast.quantize` takes it, in eval mode. It is left as it was.
        format: See `deit_fast.quantize`.
        images: (B, C, H, W), normalized.
        calibration: See `deit_fast.quantize`.
        exclude: See `deit_fast.quantize`.
        batch_size: Images in one forward pass.
        progress: Called with the number of runs over all images that are done, and of all runs.

    Returns:
        The errors, the worst layer first.

    Raises:
        ValueError: Without images, and as `deit_fast.quantize`, whose other errors are raised too.
    """
    _expect_eval(model=model)
    split = images.split(batch_size)
    if not len(images):
        raise ValueError("images: none, expected at least one")

    @torch.inference_mode()
    def logits() -> Tensor:
        return torch.cat([_logits(model, x, "model") for x in split])

    expected = logits()
    report = quantize(model, format, calibration, exclude)
    try:
        layers = {
            name: cast(QuantizedLinear, model.get_submodule(name)) for name in report.quantized
        }
        scales = {name: layer.input_scale for name, layer in layers.items()}
        done, total = 0, 1 + 2 * len(layers)

        def error() -> float:
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


def _expect_eval(**models: nn.Module) -> None:
    for name, model in models.items():
        if model.training:
            raise ValueError(f"{name}: in train mode, expected {name}.eval()")


def _on_device_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the images on the model's device; floats in its dtype."""
    like = next(model.parameters())
    return images.to(like.device, like.dtype if images.is_floating_point() else None)


def _logits(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """Return (B, classes) in fp64 on the CPU."""
    logits = model(_on_device_of(model, images)).double().cpu()
    if not logits.isfinite().all():
        raise FloatingPointError(f"{name}: logits that are not finite, in {len(images)} images")
    return logits


def _relative_error(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    got = got.to(expected)
    return ((got - expected).norm() / expected.norm()).item()


def _random_like(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Draw inputs with the rms of x; on the CPU, so that every device has the same."""
    rms = x.double().square().mean().sqrt()
    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    outliers = normal.clone()
    outliers[..., ::OUTLIERS_EVERY] *= OUTLIERS_TIMES
    drawn = {"random": normal, "outliers": outliers}
    return {k: (v * (rms.cpu() / v.square().mean().sqrt())).to(x) for k, v in drawn.items()}


def _parts(block: Any, part: str) -> tuple[Any, Any]:
    """Return the LayerNorm before a layer, or None; and the layer."""
    norm = getattr(block, _NORMS[part]) if part in _NORMS else None
    return norm, getattr(block.attn if part in ("qkv", "proj") else block.mlp, part)


def _original_output(block: Any, part: str, x: Tensor) -> Tensor:
    norm, linear = _parts(block, part)
    return linear.forward(x if norm is None else norm.forward(x))  # without their hooks


def _quantized_output(block: Any, part: str, x: Tensor) -> Tensor:
    norm, linear = _parts(block, part)
    x, backend = x.to(block.norm1.weight), block.attn.backend
    if norm is not None:
        weight, bias, eps = norm.operands
        operand = kernels.layer_norm_quantized(x, weight, bias, eps, linear.format, backend)
    else:
        operand = _quantized_input(block, part, linear, x, backend)
    return linear.project(operand, x, backend=backend)


def _quantized_input(block: Any, part: str, linear: Any, x: Tensor, backend: str) -> Quantized:
    """Quantize attention's or GELU's result as the kernel that produces it does."""
    if part == "fc2" and not is_quantized(block.mlp.fc1):  # whose kernel then does not quantize
        return kernels.quantize(x, linear.format, implementation=backend)
    if linear.input_scale is not None:
        return quantize_statically_reference(x, linear.input_scale)
    groups = block.attn.num_heads if part == "proj" else x.shape[-1] // GROUP_SIZE
    return kernels.quantize(x, linear.format, groups, backend)
