"""accelerate(model) replaces timm's modules by the drop-in ones of `deit_fast.layers`, in place.

A drop-in module is a subclass of the timm module it replaces and holds no parameters of its own. So
a module is replaced by changing the class of the instance: parameters, buffers, hooks and mode stay
what and where they are, the model itself can be replaced like what is inside it, and `restore` is
exact. No class and no global is patched. What is done to the model afterwards works as in timm:
`deit_fast.layers._fusion` explains how, and `report` lists what is not fused.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import LayerNorm as TimmLayerNorm
from torch import nn

from deit_fast import layers
from deit_fast.kernels import _chips

from .layers._base import BACKENDS, Fast
from .layers._fusion import FUSED, PlanCache, make_plan, suppress_warning
from .layers.quantized import undo
from .layers.quantized_linear import is_quantized

# timm class -> the class that replaces it. Parts come before what is made of them.
SWAPS: dict[type[nn.Module], type[Fast]] = {
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
class Skipped:
    """A module that stays timm's or runs unfused, and why.

    Attributes:
        name: its name in `named_modules()`, "" for the model itself.
        kind: the name of its class.
        reason: why, in a few words.
    """

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What `accelerate` did; `str()` of it is a text for people.

    Attributes:
        backend: "auto", "triton" or "torch".
        why_backend: where it comes from, or what "auto" means on this machine.
        replaced: class name -> names of the modules, as in `named_modules()`, "" the model itself.
        skipped: modules that stay timm's.
        unfused: replaced modules that now run timm's own forward or call a Linear instead of
            reading its weight: with hooks or adapters, or in train() with dropout. A part of a
            module that is listed is not listed again.
    """

    backend: str
    why_backend: str
    replaced: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    unfused: list[Skipped] = field(default_factory=list)

    def __str__(self):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in self.replaced.items())
        lines = [f"replaced: {counts}", f"backend: {self.backend} ({self.why_backend})"]
        for what, modules in (("skipped:", self.skipped), ("unfused:", self.unfused)):
            lines += [f"{what} {m.name or '(the model)'} ({m.kind}): {m.reason}" for m in modules]
        return "\n".join(lines)


def accelerate(
    model: nn.Module, backend: str = "auto", recompute: bool = True, strict: bool = True
) -> Report:
    """Replace every module that deit_fast computes exactly; the rest stays timm's.

    The model is changed in place: parameters, `state_dict`, hooks, devices and optimizers stay
    valid. A model that is accelerated already gets the new `backend` and `recompute`.

    Args:
        model: a timm model, or any module that contains timm's.
        backend: "auto" (CUDA tensors go to the kernels that serve the chip, CPU tensors to
            PyTorch), "triton" (always Triton) or "torch" (always plain PyTorch). The environment
            variable DEIT_FAST_BACKEND overrides it.
        recompute: whether the backward of blocks recomputes the outputs of LayerNorm and GELU, or
            they are saved (more memory, less work): see `deit_fast.layers.Block`.
        strict: False: a model in which nothing can be replaced, such as a convnet, stays timm's.

    Returns:
        What was replaced, what was skipped and why.

    Raises:
        ValueError: for an unknown backend, or where nothing can be replaced.
        RuntimeError: for "triton" on a machine that can't run it. The model is unchanged if this
            or the other is raised.
    """
    backend, why = _resolve_backend(backend)
    modules = list(model.named_modules())
    for timm_class, fast_class in SWAPS.items():
        for name, module in modules:
            if type(module) is timm_class and fast_class.why_not(module) is None:
                _replace(module, name, fast_class)
    for _, module in modules:
        if isinstance(module, Fast):
            module.backend = backend
            if hasattr(type(module), "recompute"):
                module.recompute = recompute
            suppress_warning(module)
        elif is_quantized(module):
            module.backend = backend
    found = _report(model, backend, why)
    if strict and not found.replaced:
        known = ", ".join(c.__name__ for c in SWAPS)
        reasons = "".join(f"\n  {m.name or '(the model)'}: {m.reason}" for m in found.skipped)
        raise ValueError(
            f"model: nothing to replace in {type(model).__name__}, expected a timm model with one "
            f"of {known}{reasons}"
        )
    return found


def _replace(module: Any, name: str, fast_class: type[Fast]) -> None:
    module.timm_class = type(module)
    module._plan_cache = PlanCache(name)
    module.__class__ = fast_class


def report(model: nn.Module) -> Report:
    """What of an accelerated model is replaced, skipped and unfused now; changes nothing.

    It differs from what `accelerate` returned after hooks, adapters or other layers came in, or the
    mode changed.

    Args:
        model: an accelerated model.

    Raises:
        ValueError: for a model that is not accelerated.
    """
    backends = {m.backend: None for m in model.modules() if isinstance(m, Fast)}
    if not backends:
        raise ValueError(
            f"model: nothing in {type(model).__name__} is accelerated, call deit_fast.accelerate"
        )
    return _report(model, ", ".join(backends), "as accelerated")


def _report(model: nn.Module, backend: str, why: str) -> Report:
    found = Report(backend, why)
    listed: list[str] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, Fast):
            found.replaced.setdefault(kind, []).append(name)
            plan = make_plan(module)
            if plan is not FUSED and not any(name.startswith(prefix) for prefix in listed):
                found.unfused.append(Skipped(name, kind, str(plan)))
                listed.append(f"{name}.")
        elif type(module) in SWAPS:
            reason = SWAPS[type(module)].why_not(module) or "came in since: accelerate again"
            found.skipped.append(Skipped(name, kind, reason))
        elif any(k in kind for k in _KINDS):
            found.skipped.append(Skipped(name, kind, "deit_fast has no replacement for this class"))
    return found


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` and `quantize`, in place: every drop-in module becomes timm's again.

    Parameters are not touched. Quantized layers get back the weights that they were made of or, if
    quantized ones were loaded since, those dequantized to the model's dtype.

    Args:
        model: any model.

    Returns:
        The model.
    """
    undo(model)
    for module in model.modules():
        if isinstance(module, Fast):
            timm_class = module.timm_class
            for name in ("backend", "timm_class", "heads", "recompute", "_plan_cache", "_plans"):
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
