"""DeiT and ViT classifiers of transformers as accelerated timm models, with the same logits.

transformers itself is never imported: a config is a dict, and a model its state dict. Parameters
have two layouts of names: that of transformers 4, which all files have, and that of models in
memory since transformers 5.

| transformers | timm |
|---|---|
| DeiTForImageClassificationWithTeacher | VisionTransformerDistilled |
| DeiTForImageClassification | VisionTransformer, the distillation token a register token |
| ViTForImageClassification | VisionTransformer |
"""

import re
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from deit_fast.stored_model import StoredModel, build, mlp_ratio

CLASSES = (
    "DeiTForImageClassificationWithTeacher",
    "DeiTForImageClassification",
    "ViTForImageClassification",
)
# Defaults of both config classes; a config.json may leave them out
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
_SIZES = {192: "tiny", 384: "small", 768: "base"}
# Applied in this order, each to the result of those before it
_RENAMES = [
    (r"^(deit|vit)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
]
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # PIL's numbers


def from_transformers(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Convert a transformers classifier (`CLASSES`) to an accelerated timm model, same logits.

    The weights are copied. q, k and v become one qkv; LayerNorm's eps and the label names are taken
    over; dropout and the pooler, which no classifier uses, are not. Mean and std in
    `pretrained_cfg` are ImageNet's: a transformers model does not know its own (a folder may, see
    `deit_fast.from_pretrained`).

    Args:
        model: The classifier. Its device, dtype and train() or eval() mode are kept.
        backend: See `deit_fast.accelerate`.

    Returns:
        The timm model: images (B, C, H, W) -> logits (B, classes), a plain tensor.

    Raises:
        ValueError: For another class of model, and for what timm's classes do not compute
            (`hidden_act` other than "gelu").
    """
    if not any(c.__name__ in CLASSES for c in type(model).__mro__):
        raise ValueError(f"model: {type(model).__name__}, expected one of {', '.join(CLASSES)}")
    config: Any = model.config
    stored = convert(config.to_dict(), model.state_dict(), source=type(model).__name__)
    built = build(stored, type(model).__name__, backend, like=next(model.parameters()))
    return built.train(model.training)


def convert(
    config: dict, state: dict[str, Tensor], preprocessor: dict | None = None, source: str = "config"
) -> StoredModel:
    """Describe a transformers classifier as a timm model, for `deit_fast.stored_model.build`.

    Args:
        config: The content of transformers' config.json.
        state: The state dict, in either layout of names.
        preprocessor: The content of preprocessor_config.json, if there is one.
        source: What to call the config in errors.

    Returns:
        The description, with the weights under timm's names.

    Raises:
        ValueError: For what is no DeiT or ViT classifier, or not one that timm's classes compute.
    """
    if config.get("model_type") not in ("deit", "vit"):
        raise ValueError(
            f"{source}: model_type {config.get('model_type')!r}, expected 'deit' or 'vit'"
        )
    given = {k: v for k, v in config.items() if v is not None}
    config = _DEFAULTS | given
    if config["hidden_act"] != "gelu":
        raise ValueError(
            f"{source}: hidden_act {config['hidden_act']!r}, expected 'gelu' (not approximated)"
        )
    if not any(name.endswith("classifier.weight") for name in state):
        raise ValueError(
            f"{source}: the weights have no classifier, expected {' or '.join(CLASSES)}"
        )
    try:
        return _stored(config, _timm_names(state), preprocessor or {})
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"{source}: is not as transformers writes it ({reason})") from e


def _timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("pooler."):
            renamed[name] = tensor
    for name in [n for n in renamed if ".attn.q." in n]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(p in renamed for p in parts):
            joined = name.replace(".attn.q.", ".attn.qkv.")
            renamed[joined] = torch.cat([renamed.pop(p) for p in parts])
    return renamed


def _stored(config: dict, state: dict[str, Tensor], preprocessor: dict) -> StoredModel:
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    distilled = "head_dist.weight" in state
    if "dist_token" in state and not distilled:
        # a token with a position embedding that attention reads and the head does not
        state["reg_token"] = state.pop("dist_token")
    height_width = _pair(config["image_size"])
    size = _SIZES[min(_SIZES, key=lambda known: abs(known - width))]
    resolution = 384 if size == "base" and min(height_width) >= 384 else 224
    name = f"deit_{size}_{'distilled_' if distilled else ''}patch16_{resolution}"
    classes, channels = state["head.weight"].shape[0], config["num_channels"]
    cfg = get_pretrained_cfg(name).to_dict(remove_source=True)
    for key in ("tag", "license"):  # of timm's weights, not of these
        cfg.pop(key, None)
    cfg |= {
        "architecture": name,
        "num_classes": classes,
        "input_size": (channels, *height_width),
        **_preprocessing(preprocessor),
    }
    labels = config.get("id2label") or {}
    if labels and len(labels) == classes:
        cfg["label_names"] = tuple(labels[k] for k in sorted(labels, key=int))
    args = {
        "img_size": height_width,
        "patch_size": _pair(config["patch_size"]),
        "in_chans": channels,
        "num_classes": classes,
        "embed_dim": width,
        "depth": depth,
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": mlp_ratio(config["intermediate_size"], width),
        "qkv_bias": config["qkv_bias"],
        "reg_tokens": 1 if "reg_token" in state else 0,
    }
    return StoredModel(cfg, args, state, eps=float(config["layer_norm_eps"]))


def _preprocessing(preprocessor: dict) -> dict[str, Any]:
    """Describe a transformers image processor by fields of timm's pretrained_cfg."""
    cfg: dict[str, Any] = {}
    if preprocessor.get("do_normalize", True):
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if theirs in preprocessor:
                cfg[ours] = tuple(preprocessor[theirs])
    else:
        cfg |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if "resample" in preprocessor:
        cfg["interpolation"] = _INTERPOLATIONS[preprocessor["resample"]]
    size, crop = preprocessor.get("size"), preprocessor.get("crop_size")
    if size is not None:
        edge = isinstance(size, dict) and size.get("shortest_edge")
        # with both edges given the aspect ratio is not kept
        cfg["crop_mode"] = "center" if edge else "squash"
        crops = crop is not None and preprocessor.get("do_center_crop", True)
        resized = edge or _pair(size)[0]
        cfg["crop_pct"] = _pair(crop)[0] / resized if crops else 1.0
    return cfg


def _pair(size: Any) -> tuple:
    """Return (height, width) of a number, a pair, or a dict of transformers' image processors."""
    if isinstance(size, dict):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)
