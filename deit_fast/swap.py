"""accelerate(model) turns timm's modules into the drop-in ones of `deit_fast.layers`, in place.

A drop-in module is a subclass of the timm module it stands for and holds nothing of its own, so a
swap is a change of the instance's class: parameters, buffers, hooks and mode stay what and where
they are, the model itself may be swapped as well as what is inside it, and `restore` is exact. No
class and no global is touched.
"""

import os
from dataclasses import dataclass, field

import torch
from timm.layers import LayerNorm as TimmLayerNorm
from torch import nn

from deit_fast import layers
from deit_fast.kernels import _runtime

from .layers._base import BACKENDS, Fast
from .layers.quantized import is_quantized, undo

# timm class -> the class that replaces it. Parts come before what is made of them.
SWAPS = {
    nn.LayerNorm: layers.LayerNorm,
    TimmLayerNorm: layers.LayerNorm,
    layers.Attention.timm_class: layers.Attention,
    layers.Mlp.timm_class: layers.Mlp,
    layers.PatchEmbed.timm_class: layers.PatchEmbed,
    layers.Block.timm_class: layers.Block,
    layers.TalkingHeadAttn.timm_class: layers.TalkingHeadAttn,
    layers.ClassAttn.timm_class: layers.ClassAttn,
    layers.LayerScaleBlock.timm_class: layers.LayerScaleBlock,
    layers.LayerScaleBlockClassAttn.timm_class: layers.LayerScaleBlockClassAttn,
    layers.VisionTransformer.timm_class: layers.VisionTransformer,
    layers.VisionTransformerDistilled.timm_class: layers.VisionTransformerDistilled,
    layers.Cait.timm_class: layers.Cait,
    layers.tiny_vit.ConvNorm.timm_class: layers.tiny_vit.ConvNorm,
    layers.tiny_vit.PatchEmbed.timm_class: layers.tiny_vit.PatchEmbed,
    layers.tiny_vit.PatchMerging.timm_class: layers.tiny_vit.PatchMerging,
    layers.tiny_vit.MBConv.timm_class: layers.tiny_vit.MBConv,
    layers.tiny_vit.Attention.timm_class: layers.tiny_vit.Attention,
    layers.tiny_vit.NormMlp.timm_class: layers.tiny_vit.NormMlp,
    layers.tiny_vit.TinyVitBlock.timm_class: layers.tiny_vit.TinyVitBlock,
}
_KINDS = (
    "VisionTransformer",
    "Cait",
    "PatchEmbed",
    "Block",
    "Attention",
    "Attn",
    "Mlp",
    "LayerNorm",
)


@dataclass(frozen=True)
class Left:
    """A module that stays what it was, and why."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What `accelerate` did. Module names are those of `named_modules()`, "" the model itself."""

    backend: str
    why_backend: str
    swapped: dict[str, list[str]] = field(default_factory=dict)  # class name -> module names
    left: list[Left] = field(default_factory=list)

    def __str__(self):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in self.swapped.items())
        lines = [f"swapped: {counts}", f"backend: {self.backend} ({self.why_backend})"]
        lines += [f"left:    {m.name or '(the model)'} ({m.kind}): {m.reason}" for m in self.left]
        return "\n".join(lines)


def accelerate(
    model: nn.Module, backend: str = "auto", recompute: bool = True, strict: bool = True
) -> Report:
    """Swap every module that deit_fast computes exactly; the rest stays timm's.

    `model` is changed in place and shares its parameters: `state_dict`, hooks, devices and
    optimisers stay valid. `backend`: "auto" (CUDA tensors go to the kernels that serve the chip,
    CPU tensors to PyTorch), "triton" (always Triton) or "torch" (always plain PyTorch); the
    environment variable DEIT_FAST_BACKEND overrides it. `recompute`: whether the backward passes of
    blocks make LayerNorm's and GELU's results again, or find them saved (more memory, less work):
    see `deit_fast.layers.Block`. Models already accelerated get the new choices. `strict=False`: a
    model in which nothing can be swapped, such as a convnet, stays timm's.

    Returns a `Report`. Raises ValueError for an unknown backend or where nothing can be swapped,
    RuntimeError for "triton" on a machine that can't run it. Nothing is changed if it raises.
    """
    backend, why = _resolve_backend(backend)
    report = Report(backend, why)
    modules = list(model.named_modules())
    for timm_class, fast_class in SWAPS.items():
        for name, module in modules:
            if type(module) is not timm_class:
                continue
            reason = fast_class.why_not(module)
            if reason is None:
                module.timm_class = timm_class
                module.__class__ = fast_class
            else:
                report.left.append(Left(name, timm_class.__name__, reason))
    for name, module in modules:
        kind = type(module).__name__
        if isinstance(module, Fast):
            module.backend = backend
            if hasattr(type(module), "recompute"):
                module.recompute = recompute
            report.swapped.setdefault(kind, []).append(name)
        elif is_quantized(module):
            module.backend = backend
        elif type(module) not in SWAPS and any(k in kind for k in _KINDS):
            report.left.append(Left(name, kind, "deit_fast has no replacement for this class"))
    if strict and not report.swapped:
        known = ", ".join(c.__name__ for c in SWAPS)
        reasons = "".join(f"\n  {m.name or '(the model)'}: {m.reason}" for m in report.left)
        raise ValueError(
            f"model: nothing to swap in {type(model).__name__}, want a timm model with one of "
            f"{known}{reasons}"
        )
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` and `quantize`: every drop-in module becomes timm's again, parameters
    untouched; layers in eight bits get the weights back that they were made of, or, where eight
    bits were loaded since, those as numbers of the model's dtype."""
    undo(model)
    for module in model.modules():
        if isinstance(module, Fast):
            timm_class = module.timm_class
            for name in ("backend", "timm_class", "heads", "recompute"):
                module.__dict__.pop(name, None)
            module.__class__ = timm_class
    return model


def _resolve_backend(backend: str) -> tuple[str, str]:
    source = "asked for"
    if os.environ.get("DEIT_FAST_BACKEND"):
        backend, source = os.environ["DEIT_FAST_BACKEND"], "DEIT_FAST_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} ({source}), want one of {BACKENDS}")
    if backend == "triton" and not (torch.cuda.is_available() or _runtime.INTERPRET):
        raise RuntimeError(
            f"backend 'triton' ({source}) needs a CUDA device, and this machine has none; "
            "use 'auto' or 'torch'"
        )
    if backend != "auto":
        return backend, source
    if torch.cuda.is_available():
        major, minor = _runtime.capability("cuda", None)
        return backend, f"kernels for sm_{major}{minor} on CUDA tensors, PyTorch on CPU tensors"
    return backend, "no CUDA device: PyTorch"
