"""Pairs of models with the same random weights: timm's and the accelerated one."""

import copy

import numpy as np
import timm
import torch
from checking import assert_as_accurate, assert_close, seed, seeded
from PIL import Image

import deit_fast
from deit_fast.bench import networks

TINY = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64, "num_classes": 11}


def randomize(model, seed=0):
    """Every parameter random, others for each --seed."""
    return networks.randomize(model, seeded(seed))


def pair(name="deit_tiny_distilled_patch16_224", backend="torch", **kwargs):
    """(timm's model, the accelerated copy), in eval mode."""
    seed(0)
    reference = randomize(timm.create_model(name, **kwargs)).eval()
    fast = copy.deepcopy(reference)
    deit_fast.accelerate(fast, backend)
    return reference, fast


def tiny_pair(backend="torch", distilled=True, **kwargs):
    name = f"deit_tiny{'_distilled' if distilled else ''}_patch16_224"
    return pair(name, backend, **TINY | kwargs)


def images(model, batch=2, size=None):
    seed(1)
    size = size or model.patch_embed.img_size
    return torch.randn(batch, model.patch_embed.proj.in_channels, *size)


def assert_same_logits(reference, fast, x):
    """At most twice timm's own fp32 error against fp64, with and without gradients."""
    exact = copy.deepcopy(reference).double()
    with torch.no_grad():
        true, want = exact(x.double()), reference(x)
        assert_as_accurate(fast(x), want, true, "inference")
    assert_as_accurate(fast(x), want, true, "with gradients on")


def hooked(reference, fast, name):
    """What a forward hook on that module of each sees first, or None; logits are compared."""
    seen, x = {}, images(reference)
    for model in (reference, fast):

        def hook(module, args, out, model=model):
            seen.setdefault(id(model), out)

        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        assert_close(fast(x), reference(x))
    return seen.get(id(reference)), seen.get(id(fast))


def picture(path, random, patches, size):
    """A file of random colours, (rows, columns) of them, that is (width, height) pixels wide."""
    path.parent.mkdir(exist_ok=True)
    pixels = random.integers(0, 256, (*patches, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
