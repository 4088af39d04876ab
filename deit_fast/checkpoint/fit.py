"""Load a state dict into a model: other resolutions, other heads, and errors for what misfits."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = ("head", "head_dist", "head.fc")  # the last is TinyViT's
# What pretraining adds to a backbone: DINO's projection head, MAE's decoder
PRETRAINING = ("head.mlp.", "head.last_layer.", "mask_token", "decoder_")


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], prefix: int
) -> Tensor:
    """Resize a position embedding to another grid of patches.

    The interpolation is bicubic without antialiasing, which keeps the norm of the vectors (DeiT
    paper, section 3, "Fixing the positional encoding across resolutions").

    Args:
        pos_embed: (1, prefix + h w, D).
        old_grid: Its (h, w).
        new_grid: The new (h, w).
        prefix: The number of rows in front, of class and distillation token, which are kept.

    Returns:
        (1, prefix + h w, D) for the new grid, in the same dtype.
    """
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
    """Load a state dict into a timm model.

    TinyViT's attention biases are resized to the model's windows. What only pretraining uses
    (`PRETRAINING`) is left out, with a warning.

    Args:
        model: timm's or accelerated.
        state: With timm's names.
        source: What to call it in errors and warnings.
        grid: The grid of patches of its position embedding. A VisionTransformer's or CaiT's
            embedding is resized if the model has another. None: a square grid, if the length
            differs.
        new_head: Let heads that `state` lacks, or has for another number of classes, keep their
            initialisation, with a warning.

    Raises:
        ValueError: If a key is missing, unexpected or misshaped; all are listed, and the model is
            unchanged.
    """
    own: Mapping[str, Tensor] = model.state_dict()
    state = dict(state)
    if any(name.endswith("embeddings.cls_token") for name in state.keys() - own.keys()):
        raise ValueError(
            f"{source} has transformers' names: deit_fast.from_pretrained(FOLDER) loads the folder "
            "that it was in, with its config.json"
        )
    if isinstance(model, timm.models.VisionTransformer | timm.models.Cait):
        _resize_pos_embed(model, own, state, grid)
    if isinstance(model, timm.models.TinyVit):
        _resize_attention_biases(own, state)
    notes = _drop_pretraining(own, state)
    if new_head:
        notes += _renew_heads(own, state)
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    misshaped = [
        f"{k} {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    if any(problems.values()):
        lines = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
        lines += _hints(own, state)
        raise ValueError(f"{source} does not fit {type(model).__name__}\n  " + "\n  ".join(lines))
    model.load_state_dict(state)
    for note in notes:
        warnings.warn(f"{source}: {note}", stacklevel=3)


def _resize_pos_embed(
    model: Any, own: Mapping[str, Tensor], state: dict[str, Tensor], grid: tuple[int, int] | None
) -> None:
    old = state.get("pos_embed")
    if old is None or old.dim() != 3:
        return
    # CaiT's class token is added after the trunk and has no position
    prefix = 0 if getattr(model, "no_embed_class", True) else model.num_prefix_tokens
    side = round(max(old.shape[1] - prefix, 0) ** 0.5)
    other_length = "pos_embed" in own and old.shape[1] != own["pos_embed"].shape[1]
    if grid is None and other_length and side * side == old.shape[1] - prefix:
        grid = (side, side)
    if grid is not None and old.shape[2] == model.embed_dim:
        state["pos_embed"] = resize_pos_embed(old, grid, model.patch_embed.grid_size, prefix)


def _resize_attention_biases(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
    """Resize biases (heads, offsets) to windows of another size.

    So weights for 224 pixels serve at 384 and 512: bicubic without antialiasing, as in TinyViT's
    own code.
    """
    for name in own.keys() & state.keys():
        biases, shape = state[name], own[name].shape
        if not name.endswith("attention_biases") or biases.dim() != 2 or biases.shape == shape:
            continue
        old, new = round(biases.shape[1] ** 0.5), round(shape[1] ** 0.5)
        if old * old == biases.shape[1] and biases.shape[0] == shape[0]:
            grid = biases.float().view(1, -1, old, old)
            grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
            state[name] = grid.view(shape).to(biases.dtype)


def _drop_pretraining(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Delete what only pretraining uses; returns what to warn of."""
    left_out = [k for k in state if k not in own and k.startswith(PRETRAINING)]
    for k in left_out:
        del state[k]
    if not left_out:
        return []
    # a decoder has hundreds of tensors
    modules = [k.split(".")[: 2 if k.startswith("head.") else 1] for k in left_out]
    names = dict.fromkeys(".".join(module) for module in modules)
    return [f"{', '.join(names)} left out: only pretraining uses them"]


def _renew_heads(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Replace heads that do not fit by the model's own; returns what to warn of."""
    other: list[str] = []
    new: list[str] = []
    for name in HEADS:
        parts = [f"{name}.weight", f"{name}.bias"]
        here, expected = ([k for k in parts if k in of] for of in (state, own))
        if any(k not in own or state[k].shape != own[k].shape for k in here):
            other += here
        elif here:
            continue
        else:
            new += expected
        for k in here:
            del state[k]
        state |= {k: own[k] for k in expected}
    notes = []
    if other:
        notes += [f"{', '.join(other)} left out: they are for another number of classes"]
    if new:
        notes += [f"has no {', '.join(new)}: they are newly initialized"]
    return notes


def _hints(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return explanations of frequent misfits."""
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    hints: list[str] = []
    both: tuple[Iterable[str], ...] = (missing, state)
    heads = [{k for k in of if k.rpartition(".")[0] in HEADS} for of in both]
    if missing and heads == [missing, set()]:
        hints += [
            "no classifier in it: expected num_classes=0, or the number of classes for a new one"
        ]
    if "norm.weight" in missing and "fc_norm.weight" in unexpected:
        hints += ["its norm comes after the pooling: expected global_pool='avg'"]
    firsts = {k.partition(".")[0] for k in unexpected}
    if len(firsts) == 1 and missing and missing <= {k.partition(".")[2] for k in unexpected}:
        first = firsts.pop()
        hints += [f"all names begin with {first}.: a checkpoint_key ending in {first} drops it"]
    return hints
