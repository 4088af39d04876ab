"""LoRA (Hu et al., 2021, arXiv:2106.09685): low-rank adapters beside the blocks' Linears, by peft.

A Linear with the weight W computes W x + (alpha / rank) B A x. A (rank, in) and B (out, rank) are
trained, W is not; B begins as 0. alpha is twice the rank, as is usual: the adapters' share of the
output, and with it the right learning rate, is then the same for every rank.
"""

import copy

import torch
from torch import nn

from deit_fast import swap

from .freezing import head_names

LINEARS = ("qkv", "proj", "fc1", "fc2")  # timm's names, in attention and MLP


def require_peft() -> None:
    """Check that peft is installed.

    Raises:
        RuntimeError: It is not; the message names the extra.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"lora: peft is not installed ({error}): pip install 'deit_fast[tools]'"
        ) from error


def add_adapters(model: nn.Module, rank: int, seed: int, backend: str = "auto") -> None:
    """Put adapters beside the Linears of a model's blocks, and freeze all but them and the heads.

    Args:
        model: One of timm's, accelerated or not.
        rank: Of the adapters.
        seed: Of their initialisation.
        backend: See `deit_fast.accelerate`.

    Raises:
        ValueError: The model has no such Linears.
        RuntimeError: peft is not installed.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_of_a_block(name)
    ]
    if not names:
        raise ValueError(
            f"lora: {rank}, but a {type(model).__name__} has no {', '.join(LINEARS)} in blocks, "
            "expected 0 for it"
        )
    heads = head_names(model)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if name in heads:
            parameter.requires_grad_()
    swap.accelerate(model, backend, strict=False)  # which looks at its Linears anew


def _is_of_a_block(name: str) -> bool:
    *outer, own = name.split(".")
    return own in LINEARS and any(part.startswith("blocks") for part in outer)


def merged(model: nn.Module) -> nn.Module:
    """Copy a model, its adapters merged into the weights: its parameters have timm's names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            outer, _, own = name.rpartition(".")
            setattr(model.get_submodule(outer), own, module.get_base_layer())
    del model.peft_config
    return model.requires_grad_()
