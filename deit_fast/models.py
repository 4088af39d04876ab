"""The named DeiT models (Touvron et al., 2021, Table 1) and other timm models, accelerated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ._names import MODELS as NAMES
from ._names import NANO
from .checkpoint import load_state, read_checkpoint
from .heads import set_heads
from .pretrained import from_pretrained
from .swap import accelerate

# A distilled model for grey images of 28 x 28 pixels and 10 classes; its weights are part of this
# package
_NANO_ARCHITECTURE = NAMES["deit_tiny_distilled"]
NANO_FOLDER = Path(__file__).parent / "data" / NANO
_NANO = {
    "img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10,
    "embed_dim": 64, "depth": 4, "num_heads": 2,
    "weight_init": "jax",  # Xavier's: at this width a standard deviation of 0.02 is too small
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
    **kwargs: Any,
) -> nn.Module:
    """Build one of our models (`NAMES`) or any timm model by name, load weights, and accelerate it.

    Args:
        name: A key of `NAMES`, "deit_nano_fashion", or a name that timm knows.
        pretrained: Load timm's weights from the Hugging Face hub.
        checkpoint: Load a local file instead, with timm's names: an official .pth, a .safetensors,
            or what a trainer saved (DeiT, timm, Lightning, DINO, MAE, ...). No code in it is run.
        checkpoint_key: The entry of that file, such as "model_ema" or "teacher"; see
            `deit_fast.checkpoint.read_checkpoint`.
        backend: See `accelerate`.
        heads: What a distilled model returns at inference: "joint", "joint_softmax", "class" or
            "distill"; see `set_heads`.
        strict: See `accelerate`.
        **kwargs: timm's, among them `img_size` (the position embedding is resized bicubically
            without antialiasing, as in the paper), `num_classes` (heads that the weights lack, or
            have for another number of classes, keep their initialisation, with a warning; 0: no
            head), `in_chans`, `drop_path_rate`.

    Returns:
        The timm model with its modules replaced, in train() mode, as timm builds it.

    Raises:
        ValueError: For names, options and checkpoints that do not fit.
        FileNotFoundError: For a checkpoint that does not exist.
        RuntimeError: For a model that timm does not know.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained and checkpoint: expected one of them, got both")
    if checkpoint_key is not None and checkpoint is None:
        raise ValueError(f"checkpoint_key: {checkpoint_key!r}, but no checkpoint")
    if name == NANO and pretrained:
        return from_pretrained(NANO_FOLDER, backend=backend, heads=heads, strict=strict, **kwargs)
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
    """Return timm's name for one of our models; any other name as it is."""
    return _NANO_ARCHITECTURE if name == NANO else NAMES.get(name, name)


def _pretrained(name: str, kwargs: dict) -> Any:
    """Load at the native size, then resize as the paper does: timm resizes with antialiasing."""
    if "img_size" not in kwargs:
        return timm.create_model(name, pretrained=True, **kwargs)
    native = {k: v for k, v in kwargs.items() if k != "img_size"}
    source = timm.create_model(name, pretrained=True, **native)
    model = timm.create_model(name, **kwargs)
    load_state(model, source.state_dict(), f"pretrained {name}", source.patch_embed.grid_size)
    return model


def _named(short: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
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


def deit_nano_fashion(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a distilled DeiT of 0.2 million parameters for Fashion-MNIST.

    It takes grey images of 28 x 28 pixels in patches of 4 x 4, and has 10 classes.

    Args:
        pretrained: Load the weights that come with the package; no network is needed.
        **kwargs: See `create_model`.

    Returns:
        The model, as `create_model`.

    Raises:
        ValueError: As `create_model`.
    """
    return create_model(NANO, pretrained, **kwargs)
