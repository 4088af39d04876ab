"""Small models of each family, timm's and the accelerated one, and the warnings they give."""

import warnings

import torch
from checking import seed
from modelling import SMALL_CAIT, SMALL_TINY_VIT, pair, tiny_pair
from torch import nn

import deit_fast

FAMILIES = {
    "deit": lambda backend: tiny_pair(backend, init_values=1e-2, drop_path_rate=0.1),
    "distilled": lambda backend: tiny_pair(backend),
    "vit": lambda backend: tiny_pair(backend, distilled=False),
    "plain": lambda backend: tiny_pair(backend, distilled=False, global_pool="avg"),
    "cait": lambda backend: pair("cait_xxs24_224", backend, **SMALL_CAIT),
    "tiny_vit": lambda backend: pair("tiny_vit_5m_224", backend, **SMALL_TINY_VIT),
}


def small_models(family, device="cpu", backend="torch"):
    """timm's model, the accelerated one, and images for both."""
    made = [model.to(device) for model in FAMILIES[family](backend)]
    size = 32 if family == "cait" else 64
    seed(1)
    return *made, torch.randn(2, 3, size, size).to(device)


def small_models_that_ran(family):
    """As `small_models`, and each module remembers its plan."""
    *made, x = small_models(family)
    with torch.no_grad():
        for model in made:
            model(x)
    return *made, x


class Doubled(nn.Module):
    """In the place of any layer."""

    def forward(self, x, **_):
        return 2 * x


def warnings_of(function, *args):
    """What a function returned, and the texts of its UserWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(w.message) for w in caught if w.category is UserWarning]


def unfused(model):
    """{name of a module that is not fused now: why}."""
    return {module.name: module.reason for module in deit_fast.report(model).unfused}
