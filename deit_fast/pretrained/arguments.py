"""The arguments that rebuild a model.

timm builds a model from an architecture's name, a `pretrained_cfg` and keyword arguments, and not
every version of timm remembers the arguments. So they are read off the model, and checked with a
skeleton (a model without weights) that is built from them.
"""

import contextlib
import dataclasses
import json
from typing import Any

import timm
from timm.models._pretrained import PretrainedCfg
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from deit_fast.stored_model import mlp_ratio, skeleton


def describe(model: nn.Module, **model_args: Any) -> tuple[dict, nn.Module]:
    """Find timm's keyword arguments that rebuild a model, as `save_pretrained` stores them.

    Args:
        model: See `save_pretrained`.
        **model_args: See `save_pretrained`.

    Returns:
        The arguments, and a skeleton (a model without weights) built with them.

    Raises:
        ValueError: See `save_pretrained`.
    """
    cfg = _current_cfg(model)
    for name, value in model_args.items():
        if not _is_json(value):
            raise ValueError(f"model_args: {name}={value!r} cannot be written as JSON")
    # timm 1.0.31 remembers the keyword arguments. Dropout is a setting of training, not the model's
    remembered = getattr(model, "_model_args", {})
    args = {k: v for k, v in remembered.items() if "drop" not in k and _is_json(v)}
    args = _changed_arguments(model, cfg, args) | model_args
    rebuilt = skeleton(cfg, args)
    _check_same(model, rebuilt)
    return args, rebuilt


def _current_cfg(model: nn.Module) -> dict:
    """Return the model's pretrained_cfg, corrected.

    timm 1.0.26 leaves it at what describes the weights that the model started from.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not cfg.get("architecture"):
        raise ValueError(
            f"model: {type(model).__name__} has no pretrained_cfg that names an architecture, "
            "expected a model from create_model (if it is wrapped, the model inside)"
        )
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - {"state_dict"}
    cfg = {k: v for k, v in cfg.items() if k in known}
    # A saved model has timm's own names, and labels counted from the first
    cfg |= {"custom_load": False, "label_offset": None}
    classes = getattr(model, "num_classes", cfg.get("num_classes"))
    if classes != cfg.get("num_classes"):
        cfg |= {"num_classes": classes, "label_names": None, "label_descriptions": None}
    channels, *size = cfg.get("input_size") or PretrainedCfg.input_size
    with contextlib.suppress(AttributeError, TypeError):  # not every model has one first conv
        channels = model.get_parameter(f"{cfg['first_conv']}.weight").shape[1]
    if cfg.get("fixed_input_size"):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    if (channels, *size) != tuple(cfg.get("input_size", ())):
        cfg |= {"input_size": (channels, *size), "pool_size": None}
        cfg |= {"test_input_size": None, "min_input_size": None, "test_pool_size": None}
    return cfg


def _arguments(model: nn.Module) -> dict:
    """Read timm's keyword arguments off a VisionTransformer's modules; {} for other models."""
    if not isinstance(model, VisionTransformer):
        return {}
    args = {
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "class_token": model.cls_token is not None,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not all(isinstance(m, nn.Identity) for m in (model.norm, model.fc_norm)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }
    embed, block = model.patch_embed, next(iter(model.blocks), None)
    if isinstance(embed, timm.layers.PatchEmbed):
        args |= {
            "img_size": list(embed.img_size) if embed.img_size else None,
            "patch_size": list(embed.patch_size),
            "in_chans": embed.proj.in_channels,
            "dynamic_img_pad": embed.dynamic_img_pad,
        }
    if isinstance(block, Block):
        args |= {
            "num_heads": block.attn.num_heads,
            "qkv_bias": getattr(block.attn.qkv, "bias", None) is not None,
            "proj_bias": getattr(block.attn.proj, "bias", None) is not None,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            # layer scale's initial value is lost; the weights replace it
            "init_values": 0 if isinstance(block.ls1, nn.Identity) else 1e-5,
        }
        if isinstance(block.mlp, timm.layers.Mlp):
            args["mlp_ratio"] = mlp_ratio(block.mlp.fc1.out_features, model.embed_dim)
    return args


def _changed_arguments(model: nn.Module, cfg: dict, remembered: dict) -> dict:
    """Return the keyword arguments that differ from the architecture's own."""
    own = _arguments(model)
    usual = _arguments(skeleton(cfg, {})) if own else {}
    args = {k: v for k, v in remembered.items() if k not in own}
    args |= {k: v for k, v in own.items() if v != usual.get(k)}
    if own and "global_pool" in args:  # fc_norm's default depends on it
        args["fc_norm"] = own["fc_norm"]
    return args


def _check_same(model: nn.Module, rebuilt: nn.Module) -> None:
    was, would = _facts(model), _facts(rebuilt)
    differences = [
        f"{name} is {was.get(name, 'not there')}, would be {would.get(name, 'not there')}"
        for name in was | would
        if was.get(name) != would.get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"model: what would be stored gives another {type(rebuilt).__name__}; pass the keyword"
            " arguments the model was built with (save_pretrained(model, folder, name=value))\n  "
            + "\n  ".join(differences[:4])
            + more
        )


def _facts(model: nn.Module) -> dict:
    """Return what tells two models apart.

    That is the class, the arguments, the names and shapes of the weights, and the modules without
    weights (activations, pooling) except dropout.
    """
    facts: dict[str, Any] = {"the class": getattr(model, "timm_class", type(model)).__name__}
    facts |= _arguments(model)
    scales = (".weight_scale", ".input_scale", ".output_scale")  # of quantized layers
    facts |= {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(scales)
    }
    for name, module in model.named_modules():
        kind = type(module).__name__
        bare = next(module.children(), None) is None and not module.state_dict()
        if bare and kind != "Identity" and "Drop" not in kind:
            facts[name] = repr(module)
    return facts


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
