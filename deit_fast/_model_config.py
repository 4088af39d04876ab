"""What a model expects and is: its data configuration, its device and its dtype."""

import contextlib
from collections.abc import Iterable
from typing import Any

import timm.data
import torch
from torch import nn


def data_config(model: nn.Module) -> dict[str, Any]:
    """The data configuration of a model, as timm's `resolve_model_data_config` gives it.

    Its size and channels are those that the model was really built for. timm's own keeps the
    architecture's where `img_size` or `in_chans` said otherwise.

    Args:
        model: a timm model.

    Returns:
        input_size (C, H, W) in pixels, mean, std, interpolation, crop_pct, ...
    """
    config = timm.data.resolve_model_data_config(model)
    channels, *size = config["input_size"]
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None:
        size = embed.img_size
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    with contextlib.suppress(AttributeError, TypeError):  # not every model has one first conv
        channels = model.get_parameter(f"{first}.weight").shape[1]
    return config | {"input_size": (channels, *size)}


def device_and_dtype(
    model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of a model that is ready for inference.

    Args:
        model: any model.
        dtype: expected, or None for any.
        device: expected, or None for any.

    Raises:
        ValueError: for a model in train mode, without parameters, on several devices or of several
            dtypes, or on another device.
        TypeError: for a model of another dtype.
    """
    training = [name or "(the model)" for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"model: {len(training)} of its modules are in train mode ({training[0]} first), "
            "expected model.eval()"
        )
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError("model: has no parameters, expected a model")
    devices = {p.device for p in parameters}
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if len(devices) != 1:
        raise ValueError(f"model: parameters of {_listed(devices)}, expected one device")
    if len(dtypes) != 1:
        raise ValueError(f"model: parameters of {_listed(dtypes)}, expected one dtype")
    (found,), (found_dtype,) = devices, dtypes
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"model: on {found}, expected a CPU or a CUDA device")
    wanted = found if device is None else torch.device(device)
    if wanted.type != found.type or wanted.index not in (None, found.index):
        raise ValueError(f"model: on {found}, device asks for {wanted}: call model.to({wanted})")
    if dtype not in (None, found_dtype):
        raise TypeError(f"model: {found_dtype}, dtype asks for {dtype}: call model.to({dtype})")
    return found, found_dtype


def _listed(found: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, found)))
