"""Checkpoints: read safely, fitted to another resolution, and plain about what does not fit."""

import pickle
import warnings
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = ("head", "head_dist", "head.fc")  # the last is TinyViT's
_CONTAINERS = ("model", "state_dict")  # the official .pth, and most trainers
_WRAPPED = "module."  # names of a model inside DistributedDataParallel: CaiT's official .pth


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or a .pth of tensors, alone or under "model" or
    "state_dict"; a "module." before every name is left out. Never unpickles anything but tensors
    and plain containers.

    Raises FileNotFoundError, or ValueError with one line for a file that is no such checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise ValueError(f"checkpoint: {path} is no checkpoint") from error
        raise ValueError(f"checkpoint: {path} holds more than tensors: not loaded") from error
    except Exception as error:  # garbage makes the unpickler raise anything
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "empty file"
        raise ValueError(f"checkpoint: {path} is truncated or no checkpoint ({reason})") from error
    for key in _CONTAINERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"checkpoint: {path} holds no state dict (names with tensors)")
    if all(name.startswith(_WRAPPED) for name in state):
        state = {name.removeprefix(_WRAPPED): t for name, t in state.items()}
    return state


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], prefix: int
) -> Tensor:
    """Position embedding (1, prefix + h w, D) for another grid: bicubic without antialiasing, which
    keeps the norm of the vectors (DeiT paper, section 3, "Fixing the positional encoding across
    resolutions"). The `prefix` rows in front are kept as they are."""
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    front, grid = pos_embed[:, :prefix], pos_embed[:, prefix:]
    grid = grid.unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat((front, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)), dim=1)


def load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str = "checkpoint",
    grid: tuple[int, int] | None = None,
    new_head: bool = False,
) -> None:
    """Load `state` into a timm model. The position embedding of a VisionTransformer or CaiT is
    resized where the model's grid differs from `grid`; without `grid`, where the length differs,
    from a square one. TinyViT's biases are resized to its windows.
    With `new_head`, heads of another number of classes keep their initialisation, with a warning.

    Raises ValueError that lists every missing, unexpected and misshaped key; the model is then
    unchanged.
    """
    own = model.state_dict()
    state = dict(state)
    old = state.get("pos_embed")
    resizable = isinstance(model, timm.models.VisionTransformer | timm.models.Cait)
    if old is not None and old.dim() == 3 and resizable:
        # CaiT's class token comes behind the trunk and has no position
        prefix = 0 if getattr(model, "no_embed_class", True) else model.num_prefix_tokens
        side = round(max(old.shape[1] - prefix, 0) ** 0.5)
        other_length = "pos_embed" in own and old.shape[1] != own["pos_embed"].shape[1]
        if grid is None and other_length and side * side == old.shape[1] - prefix:
            grid = (side, side)
        if grid is not None and old.shape[2] == model.embed_dim:
            state["pos_embed"] = resize_pos_embed(old, grid, model.patch_embed.grid_size, prefix)
    if isinstance(model, timm.models.TinyVit):
        _resize_attention_biases(own, state)
    if new_head:
        _drop_other_heads(own, state, source)
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    misshaped = [
        f"{k} {tuple(state[k].shape)}, want {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    if any(problems.values()):
        lines = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
        raise ValueError(f"{source} does not fit {type(model).__name__}\n  " + "\n  ".join(lines))
    model.load_state_dict(state)


def _resize_attention_biases(own, state):
    """Biases (heads, offsets) of windows of another size, so that weights for 224 pixels serve at
    384 and 512: bicubic without antialiasing, as TinyViT's code has it."""
    for name in own.keys() & state.keys():
        biases, wanted = state[name], own[name].shape
        if not name.endswith("attention_biases") or biases.dim() != 2 or biases.shape == wanted:
            continue
        old, new = (round(shape[1] ** 0.5) for shape in (biases.shape, wanted))
        if old * old == biases.shape[1] and biases.shape[0] == wanted[0]:
            grid = biases.float().view(1, -1, old, old)
            grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
            state[name] = grid.view(wanted).to(biases.dtype)


def _drop_other_heads(own, state, source):
    heads = [f"{name}.{part}" for name in HEADS for part in ("weight", "bias")]
    other = [k for k in heads if k in state and (k not in own or state[k].shape != own[k].shape)]
    if not other:
        return
    for k in other:
        del state[k]
    state |= {k: own[k] for k in heads if k in own and k not in state}
    warnings.warn(
        f"{source}: {', '.join(other)} left out: they do not fit the number of classes asked for",
        stacklevel=4,
    )
