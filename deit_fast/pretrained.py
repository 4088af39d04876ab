"""Models in folders and on the Hugging Face hub: `model.safetensors` beside timm's `config.json`.

timm builds a model from its architecture's name, a `pretrained_cfg` and keyword arguments, and not
every timm remembers the arguments. So `save_pretrained` reads them off the model, and builds a
skeleton (a model without weights) from what it is about to store, to see that it is the same model.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from timm.models._pretrained import PretrainedCfg
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .checkpoint import load_state, read_checkpoint
from .layers import VisionTransformerDistilled
from .models import set_heads
from .quantization import attends_in_eight_bits, prepare, quantized_layers
from .swap import accelerate

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
_PICKLED = "pytorch_model.bin"  # what transformers and timm wrote before safetensors
_OURS = "deit_fast"  # the key of config.json for what timm's format has no place for
# name or owner/name, with a @revision; "./x", "/x" and "~/x", which are paths, are none
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@.+)?")


class Stored(NamedTuple):
    """A model as a folder holds it: timm's part of the config, the weights, and our part."""

    pretrained_cfg: dict  # of timm, with "architecture"
    model_args: dict
    state: dict[str, Tensor]
    heads: str = "joint"
    eps: float | dict[str, float] | None = None  # of every LayerNorm, or by name; None: timm's
    quantized: dict | None = None  # {"format": ..., "layers": [name, ...]}


def save_pretrained(model: nn.Module, folder: str | Path, **model_args) -> None:
    """Write `folder`/model.safetensors and config.json in timm's hub format, for `from_pretrained`
    and, but for layers in eight bits, `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    model: of timm, accelerated or not, on any device, in any dtype (which the file keeps).
    Architecture, classes, channels and image size are read off it, for a VisionTransformer all.
    model_args: the other keyword arguments the model was built with, as far as JSON can say them.
    `heads` of a distilled model and LayerNorm's eps, where they are not the architecture's, go
    under a key of ours that timm ignores. Dropout rates are not stored.

    The folder is made if need be. An earlier model in it stays whole if anything fails.

    Raises ValueError for a model that timm did not build, and where the stored arguments would not
    give the same model back; OSError if the files cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    args, skeleton = describe(model, **model_args)

    ours = {}
    if isinstance(model, VisionTransformerDistilled) and model.heads != "joint":
        ours["heads"] = model.heads
    eps = _eps(model)
    if eps != _eps(skeleton):
        ours["eps"] = eps if len(set(eps.values())) > 1 else next(iter(eps.values()))
    if in_eight_bits := quantized_layers(model):
        ours["quantized"] = {
            "format": next(iter(in_eight_bits.values())), "layers": list(in_eight_bits),
            "attention": attends_in_eight_bits(model),
        }  # fmt: skip
    # safetensors wants contiguous tensors that share no memory
    state = {
        k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for k, v in model.state_dict().items()
    }

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        try:
            safetensors.torch.save_file(state, Path(new, WEIGHTS), metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # it reports a full disk so
            raise OSError(f"{folder}: {WEIGHTS} cannot be written ({error})") from error
        more = {_OURS: ours} if ours else {}
        save_config_for_hf(skeleton, Path(new, CONFIG), model_config=more, model_args=args)
        # safetensors gives its file to the owner alone
        shutil.copymode(Path(new, CONFIG), Path(new, WEIGHTS))
        _replace(folder, Path(new))


def describe(model: nn.Module, **model_args) -> tuple[dict, nn.Module]:
    """timm's keyword arguments that give the model back, and a skeleton built with them. Arguments
    and errors as `save_pretrained`, which stores them."""
    cfg = _current_cfg(model)
    for name, value in model_args.items():
        if not _is_json(value):
            raise ValueError(f"model_args: {name}={value!r} cannot be said in JSON")
    # timm 1.0.31 remembers the keyword arguments. Dropout is training's, not the model's
    remembered = getattr(model, "_model_args", {})
    args = {k: v for k, v in remembered.items() if "drop" not in k and _is_json(v)}
    args = _changed_arguments(model, cfg, args) | model_args
    skeleton = _skeleton(cfg, args)
    _check_same(model, skeleton)
    return args, skeleton


def from_pretrained(
    path_or_hub_id: str | Path, *, backend: str = "auto", heads: str | None = None,
    strict: bool = True, **kwargs,
) -> nn.Module:  # fmt: skip
    """The accelerated model in a folder or on the Hugging Face hub: fp32 on the CPU, in train()
    mode, as timm builds it.

    path_or_hub_id: a folder; or a hub id such as "timm/deit_tiny_patch16_224.fb_in1k" or
    "facebook/deit-base-distilled-patch16-224", with "@revision" if wanted. What exists or begins
    with ".", "/" or "~" is never looked up on the hub. The config.json is timm's, or transformers'
    of a DeiT or ViT classifier, converted then as by `integrations.huggingface.from_transformers`
    (which library that is need not be installed). The weights are a model.safetensors; in a folder
    without one a pytorch_model.bin, of which only the tensors are read; from the hub never a
    pickle.

    backend, strict: see `accelerate`. heads: see `create_model`; None: what the folder says, else
    "joint". kwargs: timm's, over the stored ones; `img_size` and `num_classes` as in
    `create_model`. Mean, std, crop and label names are in the model's `pretrained_cfg`, where
    `timm.data.resolve_model_data_config` looks.

    Raises FileNotFoundError for a folder, hub model or file that is not there or cannot be
    fetched; ValueError for files that are damaged, of an unknown kind, or do not fit each other.
    """
    fetch, source = _source(path_or_hub_id)
    config_path = fetch(CONFIG)
    if config_path is None:
        raise FileNotFoundError(f"{source}: has no {CONFIG}")
    config = _read_json(config_path)
    if "architecture" not in config and config.get("model_type") is None:
        raise ValueError(
            f"{config_path}: has neither timm's 'architecture' nor transformers' 'model_type'"
        )
    weights = fetch(WEIGHTS) or fetch(_PICKLED)
    if weights is None:
        raise FileNotFoundError(f"{source}: has no {WEIGHTS} (or, a folder here, {_PICKLED})")
    if "architecture" in config:
        stored = _read_timm(config_path, config, weights)
    else:
        # here, since it builds on this module
        from .integrations.huggingface import convert

        preprocessor = fetch(PREPROCESSOR)
        preprocessor = preprocessor and _read_json(preprocessor)
        stored = convert(config, read_checkpoint(weights), preprocessor, str(config_path))
    return build(stored, source, backend, heads, strict=strict, **kwargs)


def build(
    stored: Stored,
    source: str,
    backend: str = "auto",
    heads: str | None = None,
    like: Tensor | None = None,
    strict: bool = True,
    **kwargs,
) -> nn.Module:
    """The accelerated model that `stored` describes; `source` names it in errors. like: a tensor
    with the device and dtype the model is to have (default: CPU, fp32). The rest as
    `from_pretrained`, the errors too."""
    cfg, args = stored.pretrained_cfg, stored.model_args | kwargs
    try:
        model = timm.create_model(cfg["architecture"], pretrained_cfg=cfg, **args)
        grid = None
        if isinstance(model, VisionTransformer):
            native = model if "img_size" not in kwargs else _skeleton(cfg, stored.model_args)
            grid = native.patch_embed.grid_size
    except Exception as error:  # timm's constructors assert, and raise anything
        raise ValueError(
            f"{source}: timm {timm.__version__} cannot build {cfg['architecture']} with {args} "
            f"({_line(error)})"
        ) from error
    if like is not None:
        model.to(like.device, like.dtype)
    if stored.quantized is not None:  # as accelerate, before there are weights: now and here
        accelerate(model, backend)
        try:
            prepare(
                model, stored.quantized["format"], stored.quantized["layers"],
                stored.quantized.get("attention", False),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source}: {CONFIG} has a wrong 'quantized' ({_line(error)})"
            ) from error
    try:
        load_state(model, stored.state, source, grid, new_head="num_classes" in kwargs)
    except RuntimeError as error:  # positions that are no such grid cannot be resized
        raise ValueError(f"{source}: {WEIGHTS} does not fit {CONFIG} ({_line(error)})") from error
    norms = _layer_norms(model)
    if stored.eps is not None:
        eps = stored.eps if isinstance(stored.eps, dict) else dict.fromkeys(norms, stored.eps)
        if not eps.keys() <= norms.keys() or not all(isinstance(e, float) for e in eps.values()):
            raise ValueError(f"{source}: eps {stored.eps!r} does not fit the model's LayerNorms")
        for name, value in eps.items():
            norms[name].eps = value
    accelerate(model, backend, strict=strict)
    set_heads(model, heads or stored.heads)
    return model


# What a model says about itself


def _current_cfg(model: nn.Module) -> dict:
    """The model's pretrained_cfg, corrected where it still describes the weights it started from
    (timm 1.0.26 never corrects it)."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not cfg.get("architecture"):
        raise ValueError(
            f"model: {type(model).__name__} has no pretrained_cfg that names an architecture, expected "
            "a model from create_model (if it is wrapped, the model inside)"
        )
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - {"state_dict"}
    cfg = {k: v for k, v in cfg.items() if k in known}
    # Exports hold timm's own names, and labels counted from the first
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
    """timm's keyword arguments of a VisionTransformer, read off its modules; {} for others."""
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
            # the scale's first value is gone, and does not matter once there are weights
            "init_values": 0 if isinstance(block.ls1, nn.Identity) else 1e-5,
        }
        if isinstance(block.mlp, timm.layers.Mlp):
            args["mlp_ratio"] = mlp_ratio(block.mlp.fc1.out_features, model.embed_dim)
    return args


def mlp_ratio(hidden: int, width: int) -> float:
    """The argument that makes timm's int(width * mlp_ratio) `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _changed_arguments(model: nn.Module, cfg: dict, remembered: dict) -> dict:
    """Keyword arguments that are not the architecture's own."""
    own = _arguments(model)
    usual = _arguments(_skeleton(cfg, {})) if own else {}
    args = {k: v for k, v in remembered.items() if k not in own}
    args |= {k: v for k, v in own.items() if v != usual.get(k)}
    if own and "global_pool" in args:  # which says what fc_norm is by default
        args["fc_norm"] = own["fc_norm"]
    return args


def _skeleton(cfg: dict, args: dict) -> nn.Module:
    """timm's model without memory for its weights."""
    build = {"model_name": cfg["architecture"], "pretrained_cfg": cfg} | args
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return timm.create_model(**build)
        except NotImplementedError:  # some initialisation needs values (RegNet in timm 1.0.26)
            return timm.create_model(**build)


def _check_same(model: nn.Module, skeleton: nn.Module) -> None:
    was, would = _facts(model), _facts(skeleton)
    differences = [
        f"{name} is {was.get(name, 'not there')}, would be {would.get(name, 'not there')}"
        for name in was | would
        if was.get(name) != would.get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"model: what would be stored gives another {type(skeleton).__name__}; pass the keyword"
            " arguments the model was built with (save_pretrained(model, folder, name=value))\n  "
            + "\n  ".join(differences[:4])
            + more
        )


def _facts(model: nn.Module) -> dict:
    """What tells two models apart: class, arguments, names and shapes of the weights, and modules
    without weights (activations, pooling), but for dropout."""
    facts = {"the class": getattr(model, "timm_class", type(model)).__name__}
    facts |= _arguments(model)
    facts |= {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(
            (".weight_scale", ".input_scale", ".output_scale")
        )  # of layers in eight bits
    }
    for name, module in model.named_modules():
        kind = type(module).__name__
        bare = next(module.children(), None) is None and not module.state_dict()
        if bare and kind != "Identity" and "Drop" not in kind:
            facts[name] = repr(module)
    return facts


def _layer_norms(model: nn.Module) -> dict[str, nn.LayerNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}


def _eps(model: nn.Module) -> dict[str, float]:
    return {name: float(module.eps) for name, module in _layer_norms(model).items()}


# Files


def _replace(folder: Path, new: Path) -> None:
    """Move the files from `new` into the folder, the config last; all or, if that raises, none."""
    for name in (WEIGHTS, CONFIG):
        with open(new / name, "rb") as file:
            os.fsync(file.fileno())  # or a power failure could leave the new name without content
    earlier = new / "earlier"
    if (folder / WEIGHTS).exists():
        try:
            os.link(folder / WEIGHTS, earlier)
        except OSError:  # a file system without links
            shutil.copyfile(folder / WEIGHTS, earlier)
    try:
        for name in (WEIGHTS, CONFIG):
            os.replace(new / name, folder / name)
    except BaseException:
        if earlier.exists():
            os.replace(earlier, folder / WEIGHTS)
        else:
            (folder / WEIGHTS).unlink(missing_ok=True)
        raise


def _source(path_or_hub_id: str | Path) -> tuple[Callable[[str], Path | None], str]:
    """(name of a file -> its path, or None if there is none; what to call the source in errors)"""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return lambda name: path if (path := folder / name).is_file() else None, str(folder)
    if folder.exists():
        raise ValueError(
            f"{folder}: is a file, expected a folder (create_model(name, checkpoint=FILE) loads a file)"
        )
    text = path_or_hub_id if isinstance(path_or_hub_id, str) else ""
    if not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"{path_or_hub_id}: no such folder (and no Hugging Face hub id)")
    repo, _, revision = text.partition("@")

    def fetch(name):
        if name == _PICKLED:
            return None
        try:
            return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision or None))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                return None
            reason = error
        except Exception as error:  # the hub's errors have no common class
            reason = error
        raise FileNotFoundError(
            f"{text}: no such folder, and {name} did not come from the Hugging Face hub "
            f"(offline, or no such model? {_line(reason)})"
        ) from reason

    return fetch, text


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _read_timm(path: Path, config: dict, weights: Path) -> Stored:
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(
            f"{path}: architecture {architecture!r} is none of timm {timm.__version__}'s"
        )
    try:
        cfg, _, args = load_model_config_from_path(path.parent)
        # as timm itself declares them, where JSON only has lists; fields of a newer timm are left
        known = {field.name for field in dataclasses.fields(PretrainedCfg)}
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k in known}
        ours = config.get(_OURS) or {}
        heads, eps, quantized = (ours.get(name) for name in ("heads", "eps", "quantized"))
        cfg["architecture"] = architecture
        args = dict(args)
        if not_the_models := args.keys() & inspect.signature(timm.create_model).parameters.keys():
            raise ValueError(f"model_args has {', '.join(not_the_models)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is not as timm writes it ({_line(error)})") from error
    return Stored(cfg, args, read_checkpoint(weights), heads or "joint", eps, quantized)


def _is_json(value) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _line(error: BaseException) -> str:
    """The first line of an error, not too much of it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
