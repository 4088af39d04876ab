"""State dicts into models: other resolutions, other heads, and what does not fit."""

import warnings

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = ("head", "head_dist", "head.fc")  # the last is TinyViT's
# What only pretraining has beside a backbone: DINO's projection head, MAE's decoder
PRETRAINING = ("head.mlp.", "head.last_layer.", "mask_token", "decoder_")


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
    With `new_head`, heads that are not in `state`, or there for another number of classes, keep
    their initialisation, with a warning. What only pretraining has (`PRETRAINING`) is left out,
    with a warning.

    Raises ValueError that lists every missing, unexpected and misshaped key; the model is then
    unchanged.
    """
    own = model.state_dict()
    state = dict(state)
    if any(name.endswith("embeddings.cls_token") for name in state.keys() - own.keys()):
        raise ValueError(
            f"{source} has transformers' names: deit_fast.from_pretrained(FOLDER) loads the folder "
            "that it was in, with its config.json"
        )
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


def _drop_pretraining(own, state):
    left_out = [k for k in state if k not in own and k.startswith(PRETRAINING)]
    for k in left_out:
        del state[k]
    if not left_out:
        return []
    # a decoder has hundreds of tensors
    modules = [k.split(".")[: 2 if k.startswith("head.") else 1] for k in left_out]
    names = dict.fromkeys(".".join(module) for module in modules)
    return [f"{', '.join(names)} left out: only pretraining uses them"]


def _renew_heads(own, state):
    other, new = [], []
    for name in HEADS:
        parts = [f"{name}.weight", f"{name}.bias"]
        here, wanted = ([k for k in parts if k in of] for of in (state, own))
        if any(k not in own or state[k].shape != own[k].shape for k in here):
            other += here
        elif here:
            continue
        else:
            new += wanted
        for k in here:
            del state[k]
        state |= {k: own[k] for k in wanted}
    notes = []
    if other:
        notes += [f"{', '.join(other)} left out: they do not fit the number of classes asked for"]
    if new:
        notes += [f"has no {', '.join(new)}: they begin anew"]
    return notes


def _hints(own, state):
    """What explains a misfit that is often met."""
    missing, unexpected, hints = own.keys() - state.keys(), state.keys() - own.keys(), []
    heads = [{k for k in of if k.rpartition(".")[0] in HEADS} for of in (missing, state)]
    if missing and heads == [missing, set()]:
        hints += [
            "no classifier in it: expected num_classes=0, or as many classes as a new one is for"
        ]
    if "norm.weight" in missing and "fc_norm.weight" in unexpected:
        hints += ["its norm is behind the pooling: expected global_pool='avg'"]
    firsts = {k.partition(".")[0] for k in unexpected}
    if len(firsts) == 1 and missing and missing <= {k.partition(".")[2] for k in unexpected}:
        first = firsts.pop()
        hints += [f"all names begin with {first}.: a checkpoint_key ending in {first} drops it"]
    return hints
