"""accelerate(model) turns timm's modules into the drop-in ones of `deit_fast.layers`, in place.

A drop-in module is a subclass of the timm module it stands for and holds no parameters of its own,
so a swap is a change of the instance's class: parameters, buffers, hooks and mode stay what and
where they are, the model itself may be swapped as well as what is inside it, and `restore` is
exact. No class and no global is touched. What is done to the model afterwards works as in timm:
`deit_fast.layers._bypass` says how, and `report` what came of it.
"""

import os
from dataclasses import dataclass, field

import torch
from timm.layers import LayerNorm as TimmLayerNorm
from torch import nn

from deit_fast import layers
from deit_fast.kernels import _chips

from .layers._base import BACKENDS, Fast
from .layers._bypass import FUSED, Rule, acknowledge, examine
from .layers.quantized import undo
from .layers.quantized_linear import is_quantized

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
    """What `accelerate` did. Module names are those of `named_modules()`, "" the model itself.

    `left` stayed timm's; `unfused` are swapped modules that run timm's own forward, or call a
    Linear instead of reading it, as they are now: with hooks or adapters, or in train() with
    dropout. A part of a module that is listed is not listed again.
    """

    backend: str
    why_backend: str
    swapped: dict[str, list[str]] = field(default_factory=dict)  # class name -> module names
    left: list[Left] = field(default_factory=list)
    unfused: list[Left] = field(default_factory=list)

    def __str__(self):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in self.swapped.items())
        lines = [f"swapped: {counts}", f"backend: {self.backend} ({self.why_backend})"]
        for what, modules in (("left:   ", self.left), ("unfused:", self.unfused)):
            lines += [f"{what} {m.name or '(the model)'} ({m.kind}): {m.reason}" for m in modules]
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
    modules = list(model.named_modules())
    for timm_class, fast_class in SWAPS.items():
        for name, module in modules:
            if type(module) is timm_class and fast_class.why_not(module) is None:
                module.timm_class = timm_class
                module._rule = Rule(name)
                module.__class__ = fast_class
    for _, module in modules:
        if isinstance(module, Fast):
            module.backend = backend
            if hasattr(type(module), "recompute"):
                module.recompute = recompute
            acknowledge(module)
        elif is_quantized(module):
            module.backend = backend
    found = _report(model, backend, why)
    if strict and not found.swapped:
        known = ", ".join(c.__name__ for c in SWAPS)
        reasons = "".join(f"\n  {m.name or '(the model)'}: {m.reason}" for m in found.left)
        raise ValueError(
            f"model: nothing to swap in {type(model).__name__}, expected a timm model with one of "
            f"{known}{reasons}"
        )
    return found


def report(model: nn.Module) -> Report:
    """What of `model` is swapped, left with timm, and swapped but unfused, as it is now: after
    hooks, adapters or other layers came in, or the mode changed. Changes nothing.

    Raises ValueError for a model in which nothing is swapped.
    """
    backends = {m.backend: None for m in model.modules() if isinstance(m, Fast)}
    if not backends:
        raise ValueError(
            f"model: nothing in {type(model).__name__} is accelerated, call deit_fast.accelerate"
        )
    return _report(model, ", ".join(backends), "as accelerated")


def _report(model, backend, why) -> Report:
    found, told = Report(backend, why), []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, Fast):
            found.swapped.setdefault(kind, []).append(name)
            plan = examine(module)
            if plan is not FUSED and not any(name.startswith(prefix) for prefix in told):
                found.unfused.append(Left(name, kind, str(plan)))
                told.append(f"{name}.")
        elif type(module) in SWAPS:
            reason = SWAPS[type(module)].why_not(module) or "came in since: accelerate again"
            found.left.append(Left(name, kind, reason))
        elif any(k in kind for k in _KINDS):
            found.left.append(Left(name, kind, "deit_fast has no replacement for this class"))
    return found


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` and `quantize`: every drop-in module becomes timm's again, parameters
    untouched; layers in eight bits get the weights back that they were made of, or, where eight
    bits were loaded since, those as numbers of the model's dtype."""
    undo(model)
    for module in model.modules():
        if isinstance(module, Fast):
            timm_class = module.timm_class
            for name in ("backend", "timm_class", "heads", "recompute", "_rule"):
                module.__dict__.pop(name, None)
            module.__class__ = timm_class
    return model


def _resolve_backend(backend: str) -> tuple[str, str]:
    source = "asked for"
    if os.environ.get("DEIT_FAST_BACKEND"):
        backend, source = os.environ["DEIT_FAST_BACKEND"], "DEIT_FAST_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} ({source}), expected one of {BACKENDS}")
    if backend == "triton" and not (torch.cuda.is_available() or _chips.INTERPRET):
        raise RuntimeError(
            f"backend 'triton' ({source}) needs a CUDA device, and this machine has none; "
            "use 'auto' or 'torch'"
        )
    if backend != "auto":
        return backend, source
    if torch.cuda.is_available():
        major, minor = _chips.capability("cuda", None)
        return backend, f"kernels for sm_{major}{minor} on CUDA tensors, PyTorch on CPU tensors"
    return backend, "no CUDA device: PyTorch"
