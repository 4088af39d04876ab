"""Quantized models with random weights."""

import copy

import torch
from modelling import tiny_pair

import deit_fast

SIZE = {"img_size": 32, "num_classes": 7}
LAYERS = [
    f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
]


def quantized_pair(format, backend="torch", calibration=None, exclude=(), **kwargs):
    """timm's model, and the accelerated and quantized one."""
    reference, fast = tiny_pair(backend, **kwargs)
    deit_fast.quantize(fast, format, calibration, exclude)
    return reference, fast


def quantized_copy(model, format, only=LAYERS, **options):
    """A copy with these layers quantized."""
    quantized = copy.deepcopy(model)
    exclude = [name for name in LAYERS if name not in only]
    deit_fast.quantize(quantized, format, exclude=exclude, **options)
    return quantized


def logits(model, x):
    with torch.no_grad():
        return model(x)
