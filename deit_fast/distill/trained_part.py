"""Which part of its model a run trains, and what it says about that."""

from torch import nn

from .adapters import add_adapters, require_peft
from .freezing import freeze
from .recipe import Recipe
from .student import Settings


def require_possible(settings: Settings, recipe: Recipe) -> None:
    """Check what can be checked before anything is loaded.

    Raises:
        ValueError: Adapters and frozen blocks together.
        RuntimeError: peft is not installed.
    """
    if settings.lora and recipe.freeze:
        raise ValueError(
            f"freeze: {recipe.freeze} with lora {settings.lora}, expected 0: all but the adapters "
            "and the heads is frozen then"
        )
    if settings.lora:
        require_peft()


def choose(model: nn.Module, settings: Settings, recipe: Recipe) -> list[str]:
    """Add adapters to a model or freeze blocks of it, as is asked for.

    Returns:
        Notes for the user, where not all of the model is trained.

    Raises:
        ValueError: The model has no such blocks, or no Linears for adapters.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    if settings.lora:
        add_adapters(model, settings.lora, settings.seed, settings.backend)
    freeze(model, recipe.freeze)
    if not settings.lora and not recipe.freeze:
        return []
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return [f"trained: {trained:,} parameters; the model has {whole:,}"]
