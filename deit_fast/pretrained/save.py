"""Save a model in a folder in timm's hub format. An earlier model stays whole if anything fails."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from deit_fast import calibration
from deit_fast.layers import VisionTransformerDistilled
from deit_fast.quantization import has_fp8_attention, quantized_layers
from deit_fast.stored_model import CONFIG, WEIGHTS, layer_norms

from .arguments import describe

OWN_KEY = "deit_fast"  # the key of config.json for what timm's format has no place for


def save_pretrained(model: nn.Module, folder: str | Path, **model_args: Any) -> None:
    """Write `folder`/model.safetensors and config.json in timm's hub format.

    `from_pretrained` loads the folder, and, unless layers are quantized, so does
    `timm.create_model("local-dir:FOLDER", pretrained=True)`. Architecture, classes, channels and
    image size are read off the model, for a VisionTransformer all arguments. `heads` of a distilled
    model and LayerNorm's eps, where they are not the architecture's, go under a key of our own,
    which timm ignores, and so does a calibration (see `deit_fast.calibration`). Dropout rates are
    not stored.

    Args:
        model: A model of timm, accelerated or not, on any device, in any dtype. The file keeps the
            dtype.
        folder: Created if it does not exist. If anything fails, an earlier model in it stays whole.
        **model_args: The other keyword arguments that the model was built with, of types that JSON
            has.

    Raises:
        ValueError: If timm did not build the model, or the stored arguments would not rebuild it.
        OSError: If the files cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    args, rebuilt = describe(model, **model_args)

    own: dict[str, Any] = {}
    if isinstance(model, VisionTransformerDistilled) and model.heads != "joint":
        own["heads"] = model.heads
    eps = _eps(model)
    if eps != _eps(rebuilt):
        own["eps"] = eps if len(set(eps.values())) > 1 else next(iter(eps.values()))
    if quantized := quantized_layers(model):
        own["quantized"] = {
            "format": next(iter(quantized.values())), "layers": list(quantized),
            "attention": has_fp8_attention(model),
        }  # fmt: skip
    calibrated = calibration.of(model)
    # safetensors takes only contiguous tensors that share no memory
    state = {
        k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for k, v in model.state_dict().items()
    }

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        try:
            safetensors.torch.save_file(state, Path(new, WEIGHTS), metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # what it raises for a full disk
            raise OSError(f"{folder}: {WEIGHTS} cannot be written ({error})") from error
        extra = {OWN_KEY: own} if own else {}
        if calibrated is not None:
            extra[calibration.KEY] = calibrated.as_dict()
        save_config_for_hf(rebuilt, Path(new, CONFIG), model_config=extra, model_args=args)
        # safetensors makes its file readable for the owner alone
        shutil.copymode(Path(new, CONFIG), Path(new, WEIGHTS))
        _replace(folder, Path(new))


def _eps(model: nn.Module) -> dict[str, float]:
    return {name: float(module.eps) for name, module in layer_norms(model).items()}


def _replace(folder: Path, new: Path) -> None:
    """Move the files from `new` into the folder, the config last; all or, if that raises, none."""
    for name in (WEIGHTS, CONFIG):
        with open(new / name, "rb") as file:
            os.fsync(file.fileno())  # or a power failure could leave the new name without content
    earlier = new / "earlier"
    if (folder / WEIGHTS).exists():
        try:
            os.link(folder / WEIGHTS, earlier)
        except OSError:  # a file system without hard links
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
