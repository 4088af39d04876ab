"""Attention rollout against numpy, and the tokens' maps."""

import itertools

import numpy as np
import pytest
import torch
from checking import BF16, assert_close, assert_differ, assert_equal
from modelling import images, pair, timms_softmax, tiny_pair

import deit_fast
from deit_fast.attention_weights import token_maps

CAIT = "cait_xxs24_224"


def by_numpy(maps, fusion, ratio):
    """One image at a time, in fp64, as vit-explain has it, but for rows instead of columns."""
    every = []
    for image in range(len(next(iter(maps.values())))):
        product = np.eye(next(iter(maps.values())).shape[-1])
        for p in maps.values():
            fused = getattr(np, fusion)(p[image].double().numpy(), axis=0)
            lowest = np.argsort(fused, axis=None)[: int(fused.size * ratio)]
            fused.flat[lowest[lowest != 0]] = 0
            step = 0.5 * fused + 0.5 * np.eye(len(fused))
            product = step / step.sum(1, keepdims=True) @ product
        every.append(product)
    return torch.from_numpy(np.stack(every))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_by_numpy(fusion, ratio):
    models = tiny_pair(img_size=(32, 80), depth=3, num_heads=4, embed_dim=128)
    x, found = images(models[0], batch=3), []
    maps = timms_softmax(models[0], x)
    want = by_numpy(maps, fusion, ratio)
    for model in models:
        found.append(deit_fast.attention_rollout(model, x, fusion, ratio))
        assert_close(found[-1], want.float())
        assert_close(found[-1].sum(-1), torch.ones(3, 12))
        assert_differ(found[-1][0], found[-1][1])
    others = itertools.product(("mean", "max", "min"), (0.0, 0.5, 0.999))
    for other in others:
        if other != (fusion, ratio):
            assert_differ(by_numpy(maps, *other), want)
    assert_equal(deit_fast.attention_rollout(models[0], x),
                 deit_fast.attention_rollout(models[0], x, "mean", 0.0))  # fmt: skip


def test_rollout_errors():
    model = tiny_pair()[1]
    x = images(model)
    with torch.autocast("cpu", BF16):
        rollout = deit_fast.attention_rollout(model, x)
    assert_close(rollout.sum(-1), torch.ones(2, 18))
    with pytest.raises(ValueError, match=r"head_fusion: 'sum', want one of \('mean', 'max', 'min'"):
        deit_fast.attention_rollout(model, x, "sum")
    for ratio in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="discard_ratio: .*, want 0 or more, and less than 1"):
            deit_fast.attention_rollout(model, x, discard_ratio=ratio)
    for cait in pair(CAIT, depth=1, img_size=32):
        with pytest.raises(ValueError, match="model: Cait mixes its heads behind the softmax"):
            deit_fast.attention_rollout(cait, images(cait))


def test_maps_of_the_tokens():
    """Row by row of patches, behind the tokens."""
    for (model, _), names, first in (
        (tiny_pair(img_size=(32, 80)), ["class", "distillation"], 2),
        (tiny_pair(img_size=(32, 80), distilled=False, reg_tokens=3), ["class"], 4),
        (pair(CAIT, depth=1, img_size=(32, 80)), ["class"], 1),
    ):
        x = images(model)
        p = deit_fast.attention_maps(model, x, -1).popitem()[1]
        for weights in (p, p.mean(1)):
            maps = token_maps(model, x, weights)
            assert list(maps) == names
            for row, (name, of) in enumerate(maps.items()):
                for i, j in np.ndindex(2, 5):
                    assert_equal(of[..., i, j], weights[..., row, first + 5 * i + j], name)
        as_bytes = torch.zeros(2, 32, 80, 3, dtype=torch.uint8)
        assert_equal(token_maps(model, as_bytes, p), token_maps(model, x, p))
    trunk = deit_fast.attention_maps(model, x, 0)["blocks.0"]
    headless = tiny_pair(distilled=False, class_token=False, reg_tokens=1, global_pool="avg")[1]
    x = images(headless)
    for other, weights in ((model, trunk), (headless, deit_fast.attention_rollout(headless, x))):
        with pytest.raises(ValueError, match="weights: .* patches behind a class token"):
            token_maps(other, images(other), weights)
