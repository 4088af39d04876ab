"""Which part of a model is trained: all of it, what comes after some blocks, or the heads alone.

Autograd computes no gradient for what is frozen. The first frozen layers need none for their
outputs either, so that backward ends where the trained part begins.
"""

from typing import Any

from timm.models import group_parameters
from torch import nn

STEM_DROPOUTS = ("pos_drop", "patch_drop")  # timm's, which have no parameters to know them by


def freeze(model: nn.Module, blocks: int) -> None:
    """Freeze the first blocks of a model, by `requires_grad`.

    Layers are those of timm's `group_matcher`. What comes before the first block is frozen with it:
    patch embedding, tokens, position embedding. The last norm belongs to the last block.

    Args:
        model: One of timm's, accelerated or not.
        blocks: How many, from the input; 0: none; -1: everything but the classifiers.

    Raises:
        ValueError: The model has fewer blocks, or timm does not say what its layers are.
    """
    if not blocks:
        return
    heads = head_names(model)
    frozen = {name for name, _ in model.named_parameters()} - heads
    if blocks > 0:
        layers = _layers(model, blocks)
        most = min(layers[name] for name in heads) - 1
        if blocks > most:
            raise ValueError(
                f"freeze: {blocks}, expected at most {most}, the model's blocks, or -1: all but "
                "the heads"
            )
        frozen = {name for name in frozen if layers[name] <= blocks}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def head_names(model: nn.Module) -> set[str]:
    """Name the parameters of the classifiers: of a distilled model both."""
    timms: Any = model  # timm's methods are not typed
    heads = timms.get_classifier()
    parts = heads if isinstance(heads, tuple) else (heads,)
    own = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _layers(model: nn.Module, blocks: int) -> dict[str, int]:
    """The layer of each parameter: 0 before the first block, then the blocks from 1, the heads."""
    timms: Any = model
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            f"freeze: {blocks}, but timm knows no layers of a {type(model).__name__}, expected 0, "
            "or -1: all but the heads"
        )
    layers = group_parameters(model, timms.group_matcher(coarse=False), reverse=True)
    if hasattr(model, "blocks_token_only"):  # of CaiT: timm has them beside the last blocks
        depth, more = len(timms.blocks), len(timms.blocks_token_only)
        for name in layers:
            if name.startswith("blocks_token_only."):
                layers[name] = depth + 1 + int(name.split(".")[1])
            elif name.startswith("norm."):
                layers[name] = depth + more
            elif layers[name] > depth:
                layers[name] = depth + more + 1
    return layers


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Find what stays in eval mode: the outermost modules that have nothing to train.

    Their dropout and stochastic depth are off, and their batch norm keeps its statistics.
    """
    names = [name for name in STEM_DROPOUTS if hasattr(model, name)]
    return [getattr(model, name) for name in names] + _without_gradients(model)


def _without_gradients(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            found.append(child)
        else:
            found += _without_gradients(child)
    return found
