"""What files say about a model, and how a model is built from that.

`deit_fast.pretrained` reads it from a folder, `deit_fast.integrations.huggingface` derives it from
a model of transformers. Both build on this module.
"""

import math
import warnings
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .calibration import Calibration, attach
from .checkpoint import load_state
from .heads import set_heads
from .quantization import convert_for_loading
from .swap import accelerate

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class StoredModel(NamedTuple):
    """A model as files describe it.

    Attributes:
        pretrained_cfg: timm's configuration, with "architecture".
        model_args: timm's keyword arguments.
        state: The state dict, with timm's names.
        heads: See `deit_fast.set_heads`.
        eps: Of every LayerNorm, or by module name; None: the architecture's.
        quantized: None, or {"format": ..., "layers": [name, ...], "attention": bool}.
        calibration: None, or that of the logits with these heads at this image size.
    """

    pretrained_cfg: dict
    model_args: dict
    state: dict[str, Tensor]
    heads: str = "joint"
    eps: float | dict[str, float] | None = None
    quantized: dict | None = None
    calibration: Calibration | None = None


def build(
    stored: StoredModel,
    source: str,
    backend: str = "auto",
    heads: str | None = None,
    like: Tensor | None = None,
    strict: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Build the accelerated model that `stored` describes.

    Args:
        stored: The description and the weights.
        source: What to call the files in errors.
        backend: See `deit_fast.accelerate`.
        heads: See `deit_fast.set_heads`; None: the stored choice.
        like: A tensor with the device and dtype for the model (default: CPU, fp32).
        strict: See `deit_fast.accelerate`.
        **kwargs: timm's keyword arguments, over the stored ones; `img_size` and `num_classes` as
            in `deit_fast.create_model`.

    Returns:
        The model, in train() mode, as timm builds it.

    Raises:
        ValueError: If timm can't build the model, or the weights do not fit it.
    """
    cfg, args = stored.pretrained_cfg, stored.model_args | kwargs
    try:
        model = timm.create_model(cfg["architecture"], pretrained_cfg=cfg, **args)
        grid = None
        if isinstance(model, VisionTransformer):
            native = model if "img_size" not in kwargs else skeleton(cfg, stored.model_args)
            grid = native.patch_embed.grid_size
    except Exception as error:  # timm's constructors assert, and raise anything
        raise ValueError(
            f"{source}: timm {timm.__version__} cannot build {cfg['architecture']} with {args} "
            f"({first_line(error)})"
        ) from error
    if like is not None:
        model.to(like.device, like.dtype)
    if stored.quantized is not None:  # before the weights: the state dict has quantized ones
        accelerate(model, backend)
        try:
            convert_for_loading(
                model, stored.quantized["format"], stored.quantized["layers"],
                stored.quantized.get("attention", False),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source}: {CONFIG} has a wrong 'quantized' ({first_line(error)})"
            ) from error
    try:
        load_state(model, stored.state, source, grid, new_head="num_classes" in kwargs)
    except RuntimeError as error:  # a position embedding of another grid cannot be resized
        reason = first_line(error)
        raise ValueError(f"{source}: {WEIGHTS} does not fit {CONFIG} ({reason})") from error
    norms = layer_norms(model)
    if stored.eps is not None:
        eps = stored.eps if isinstance(stored.eps, dict) else dict.fromkeys(norms, stored.eps)
        if not eps.keys() <= norms.keys() or not all(isinstance(e, float) for e in eps.values()):
            raise ValueError(f"{source}: eps {stored.eps!r} does not fit the model's LayerNorms")
        for name, value in eps.items():
            norms[name].eps = value
    accelerate(model, backend, strict=strict)
    set_heads(model, heads or stored.heads)
    if stored.calibration is not None and "num_classes" not in kwargs:
        changed = [heads] if heads not in (None, stored.heads) else []
        if kwargs.get("img_size"):
            changed.append(f"img_size {kwargs['img_size']}")
        if changed:
            warnings.warn(
                f"{source}: its calibration is left out, for it does not hold with "
                f"{' and '.join(changed)}",
                stacklevel=3,
            )
        else:
            attach(model, stored.calibration)
    return model


def skeleton(cfg: dict, args: dict) -> Any:
    """Build timm's model without memory for its weights.

    Args:
        cfg: timm's pretrained_cfg, with "architecture".
        args: timm's keyword arguments.

    Returns:
        The model, on the meta device where timm can build it there. The state of the random number
        generator is left as it was.
    """
    build = {"model_name": cfg["architecture"], "pretrained_cfg": cfg} | args
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return timm.create_model(**build)
        except NotImplementedError:  # some initialisation needs values (RegNet in timm 1.0.26)
            return timm.create_model(**build)


def layer_norms(model: nn.Module) -> dict[str, nn.LayerNorm]:
    """Return every LayerNorm of a model by its name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio for which timm's int(width * mlp_ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters of it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
