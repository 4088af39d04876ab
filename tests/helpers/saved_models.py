"""Small models in folders."""

import json
from pathlib import Path

import pytest
import torch
from checking import seed
from modelling import TINY, images, randomize

import deit_fast
from deit_fast.pretrained import from_pretrained

DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"


def tiny(name=DISTILLED, heads="joint", **kwargs):
    seed(0)
    model = deit_fast.create_model(name, backend="torch", heads=heads, **TINY | kwargs)
    return randomize(model).eval()


def forget(model):
    """As timm before 1.0.31, which does not keep the keyword arguments."""
    model.__dict__.pop("_model_args", None)
    model.__dict__.pop("_traits", None)
    return model


def assert_equal_models(got, expected):
    state, weights = got.state_dict(), expected.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor), name
    x = images(expected)
    with torch.no_grad():
        assert torch.equal(got.eval()(x), expected.eval()(x))


def read(folder):
    return json.loads(Path(folder, "config.json").read_text())


def write(folder, **changes):
    config = read(folder) | changes
    Path(folder, "config.json").write_text(json.dumps(config))


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match) as caught:
        from_pretrained(*args, **kwargs)
    return str(caught.value)
