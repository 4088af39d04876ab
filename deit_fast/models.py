"""The named DeiT models (Touvron et al., 2021, Table 1) and other timm models, accelerated."""

from importlib.resources import files
from pathlib import Path

import timm
from torch import nn

from .checkpoint import load_state, read_checkpoint
from .kernels.classifier import FUSIONS
from .layers import VisionTransformerDistilled
from .swap import accelerate

NAMES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "deit_base_384": "deit_base_patch16_384",
    "deit_tiny_distilled": "deit_tiny_distilled_patch16_224",
    "deit_small_distilled": "deit_small_distilled_patch16_224",
    "deit_base_distilled": "deit_base_distilled_patch16_224",
    "deit_base_distilled_384": "deit_base_distilled_patch16_384",
}

# Distilled, for 28 x 28 grey pixels and 10 classes: its weights are part of this package
NANO, _NANO_OF = "deit_nano_fashion", NAMES["deit_tiny_distilled"]
_NANO = {
    "img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10,
    "embed_dim": 64, "depth": 4, "num_heads": 2,
    "weight_init": "jax",  # at this width 0.02 is too little to begin with: Xavier's
}  # fmt: skip
_NANO_DATA = {"mean": (0.286,), "std": (0.353,), "crop_pct": 1.0}  # Fashion-MNIST's


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    backend: str = "auto",
    heads: str = "joint",
    strict: bool = True,
    **kwargs,
) -> nn.Module:
    """Build a model of ours (`NAMES`) or of timm's by name, load weights, and accelerate it.

    pretrained: timm's weights from the Hugging Face hub. checkpoint: a local file instead, with
    timm's names: an official .pth, a .safetensors, or what a trainer saved (DeiT, timm, Lightning,
    DINO, MAE, ...); nothing in it is run. checkpoint_key: which entry of it, such as "model_ema" or
    "teacher", see `deit_fast.checkpoint.read_checkpoint`. kwargs: timm's, among them `img_size`
    (the position embedding is resized bicubically without antialiasing, as in the paper),
    `num_classes` (heads of which the weights have none, or another number, start anew, with a
    warning; 0: no head), `in_chans`, `drop_path_rate`. backend, strict: see `accelerate`. heads,
    for distilled models at inference: "joint" | "joint_softmax" | "class" | "distill".

    Returns the timm model with its modules swapped, in train() mode as timm builds it.
    Raises ValueError for names, options and checkpoints that do not fit, FileNotFoundError,
    RuntimeError (timm's) for an unknown timm model.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained and checkpoint: expected one of them, got both")
    if checkpoint_key is not None and checkpoint is None:
        raise ValueError(f"checkpoint_key: {checkpoint_key!r}, but no checkpoint")
    if name == NANO and pretrained:
        from .pretrained import from_pretrained  # here, since it builds on this module

        folder = files("deit_fast").joinpath("data", NANO)
        return from_pretrained(folder, backend=backend, heads=heads, strict=strict, **kwargs)
    is_nano, name = name == NANO, architecture(name)
    if pretrained:
        model = _pretrained(name, kwargs)
    else:
        model = timm.create_model(name, **((_NANO | kwargs) if is_nano else kwargs))
    if is_nano:
        model.pretrained_cfg = dict(model.pretrained_cfg) | _NANO_DATA
    if checkpoint is not None:
        state = read_checkpoint(checkpoint, checkpoint_key)
        load_state(model, state, f"checkpoint {checkpoint}", new_head="num_classes" in kwargs)
    accelerate(model, backend, strict=strict)
    set_heads(model, heads)
    return model


def architecture(name: str) -> str:
    """What timm calls a model of ours; other names are timm's as they are."""
    return _NANO_OF if name == NANO else NAMES.get(name, name)


def set_heads(model: nn.Module, heads: str) -> None:
    """Say what a distilled model returns at inference: "joint" | "joint_softmax" | "class" |
    "distill". Raises ValueError for anything else, and for a model with one head asked for more
    than "joint"."""
    if heads not in FUSIONS:
        raise ValueError(f"heads: {heads!r}, expected one of {FUSIONS}")
    if isinstance(model, VisionTransformerDistilled):
        model.heads = heads
    elif heads != "joint":
        raise ValueError(f"heads: {heads!r}, but {type(model).__name__} has one head")


def _pretrained(name, kwargs):
    """timm resizes with antialiasing; so load at the native size and resize as the paper does."""
    if "img_size" not in kwargs:
        return timm.create_model(name, pretrained=True, **kwargs)
    native = {k: v for k, v in kwargs.items() if k != "img_size"}
    source = timm.create_model(name, pretrained=True, **native)
    model = timm.create_model(name, **kwargs)
    load_state(model, source.state_dict(), f"pretrained {name}", source.patch_embed.grid_size)
    return model


def _named(short: str):
    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        return create_model(short, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = short
    build.__doc__ = (
        f"timm's {NAMES[short]} with deit_fast's modules; arguments and errors as `create_model`."
    )
    return build


deit_tiny = _named("deit_tiny")
deit_small = _named("deit_small")
deit_base = _named("deit_base")
deit_base_384 = _named("deit_base_384")
deit_tiny_distilled = _named("deit_tiny_distilled")
deit_small_distilled = _named("deit_small_distilled")
deit_base_distilled = _named("deit_base_distilled")
deit_base_distilled_384 = _named("deit_base_distilled_384")


def deit_nano_fashion(pretrained: bool = False, **kwargs) -> nn.Module:
    """A distilled DeiT of 0.2 million parameters for Fashion-MNIST: 28 x 28 grey pixels, patches of
    4, 10 classes. pretrained: with the weights that come with the package; no network is needed.
    Other arguments, and errors, as `create_model`."""
    return create_model(NANO, pretrained, **kwargs)
