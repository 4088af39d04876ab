"""Load a model from a folder or from the Hugging Face hub."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import load_model_config_from_path
from timm.models._pretrained import PretrainedCfg
from torch import nn

from deit_fast import calibration
from deit_fast.checkpoint import read_checkpoint
from deit_fast.integrations import huggingface
from deit_fast.stored_model import CONFIG, WEIGHTS, StoredModel, build, first_line

from .save import OWN_KEY
from .source import PICKLED, open_source

PREPROCESSOR = "preprocessor_config.json"


def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    backend: str = "auto",
    heads: str | None = None,
    strict: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Load the model in a folder or on the Hugging Face hub, and accelerate it.

    The config.json is timm's, or that of a DeiT or ViT classifier of transformers, which is then
    converted as by `integrations.huggingface.from_transformers` (transformers itself need not be
    installed). The weights are a model.safetensors; in a folder without one a pytorch_model.bin, of
    which only the tensors are read; from the hub never a pickle.

    Args:
        path_or_hub_id: A folder; or a hub id such as "timm/deit_tiny_patch16_224.fb_in1k" or
            "facebook/deit-base-distilled-patch16-224", with "@revision" if needed. A path that
            exists or begins with ".", "/" or "~" is never looked up on the hub.
        backend: See `accelerate`.
        heads: See `create_model`; None: the stored choice, else "joint".
        strict: See `accelerate`.
        **kwargs: timm's, over the stored ones; `img_size` and `num_classes` as in `create_model`.

    Returns:
        The model, fp32 on the CPU, in train() mode, as timm builds it. Mean, std, crop and label
        names are in its `pretrained_cfg`, where `timm.data.resolve_model_data_config` looks, and so
        is its calibration (see `deit_fast.calibration`), unless `heads`, `img_size` or
        `num_classes` ask for another model than the one it was found for.

    Raises:
        FileNotFoundError: For a folder, hub model or file that does not exist or cannot be fetched.
        ValueError: For files that are damaged, of an unknown kind, or do not fit each other.
    """
    fetch, source = open_source(path_or_hub_id)
    config_path = fetch(CONFIG)
    if config_path is None:
        raise FileNotFoundError(f"{source}: has no {CONFIG}")
    config = _read_json(config_path)
    if "architecture" not in config and config.get("model_type") is None:
        raise ValueError(
            f"{config_path}: has neither timm's 'architecture' nor transformers' 'model_type'"
        )
    weights = fetch(WEIGHTS) or fetch(PICKLED)
    if weights is None:
        raise FileNotFoundError(f"{source}: has no {WEIGHTS} (or, a folder here, {PICKLED})")
    if "architecture" in config:
        stored = _read_timm(config_path, config, weights)
    else:
        path = fetch(PREPROCESSOR)
        preprocessor = None if path is None else _read_json(path)
        state = read_checkpoint(weights)
        stored = huggingface.convert(config, state, preprocessor, str(config_path))
    return build(stored, source, backend, heads, strict=strict, **kwargs)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _read_timm(path: Path, config: dict, weights: Path) -> StoredModel:
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(
            f"{path}: architecture {architecture!r} is none of timm {timm.__version__}'s"
        )
    try:
        cfg, _, args = load_model_config_from_path(path.parent)
        # tuples as timm declares them: JSON has lists. Fields of a newer timm are left out
        known = {field.name for field in dataclasses.fields(PretrainedCfg)}
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k in known}
        own = config.get(OWN_KEY) or {}
        heads, eps, quantized = (own.get(name) for name in ("heads", "eps", "quantized"))
        cfg["architecture"] = architecture
        args = dict(args)
        if wrong := args.keys() & inspect.signature(timm.create_model).parameters.keys():
            raise ValueError(f"model_args has {', '.join(wrong)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is not as timm writes it ({first_line(error)})") from error
    try:
        stored = config.get(calibration.KEY)
        calibrated = None if stored is None else calibration.read(stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    state = read_checkpoint(weights)
    return StoredModel(cfg, args, state, heads or "joint", eps, quantized, calibrated)
