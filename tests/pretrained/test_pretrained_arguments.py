"""The arguments that rebuild a model: read off it, or refused."""

import os

import pytest
import timm
import torch
from modelling import randomize
from saved_models import PLAIN, assert_equal_models, forget, read, tiny
from tiers import slow_but
from torch import nn

import deit_fast
from deit_fast.layers import VisionTransformer
from deit_fast.pretrained import from_pretrained, save_pretrained
from deit_fast.stored_model import mlp_ratio

VARIANTS = {
    "wide": {"img_size": (32, 96)},
    "patch": {"patch_size": 8},
    "no classes": {"num_classes": 0},
    "grey": {"in_chans": 1},
    "heads": {"num_heads": 1},
    "other MLP": {"mlp_ratio": 100.5 / 64},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
    "LayerScale": {"init_values": 0.1},
    "q and k norm": {"qk_norm": True},
    "average": {"global_pool": "avg"},
    "average without fc_norm": {"global_pool": "avg", "fc_norm": False},
    "average of all": {"global_pool": "avg", "pool_include_prefix": True},
    "no class token": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "no positions": {"pos_embed": "none"},
    "norm in front": {"pre_norm": True},
    "no final norm": {"final_norm": False},
    "dropout": {"drop_rate": 0.1, "drop_path_rate": 0.2},
}


@pytest.mark.parametrize(
    "variant", slow_but(VARIANTS, "wide", "LayerScale", "registers", "average")
)
def test_arguments_are_read_off_the_model(variant, tmp_path):
    model = tiny(PLAIN, **VARIANTS[variant])
    save_pretrained(forget(model), tmp_path)
    assert_equal_models(from_pretrained(tmp_path), model)


def test_dynamic_sizes_come_back(tmp_path):
    model = tiny(PLAIN, dynamic_img_size=True, dynamic_img_pad=True)
    save_pretrained(forget(model), tmp_path)
    x = torch.randn(1, 3, 40, 90)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path).eval()(x), model(x))


def test_only_what_is_not_the_architectures_is_stored(tmp_path):
    save_pretrained(forget(tiny(img_size=224, num_classes=1000, depth=3)), tmp_path)
    assert read(tmp_path)["model_args"].items() >= {"embed_dim": 64, "num_heads": 2}.items()
    assert not read(tmp_path)["model_args"].keys() & {"mlp_ratio", "patch_size", "qkv_bias"}
    assert "deit_fast" not in read(tmp_path)


def test_mlp_ratio_survives_rounding_down():
    assert int(11 * (15 / 11)) == 14
    for width in range(1, 200):
        for hidden in range(1, 900, 7):
            assert int(width * mlp_ratio(hidden, width)) == hidden


def test_surgery_after_the_model_was_built_comes_back(tmp_path):
    model = tiny(PLAIN, in_chans=3)
    model.reset_classifier(4)
    model.patch_embed.proj = nn.Conv2d(1, 64, 16, 16)
    save_pretrained(model, tmp_path)
    assert_equal_models(from_pretrained(tmp_path), model)


@pytest.mark.slow
def test_models_that_are_no_vision_transformer(tmp_path):
    options = {"depth": 1, "img_size": 64, "num_classes": 5}
    model = deit_fast.create_model("cait_xxs24_224", backend="torch", **options).eval()
    randomize(model)
    with pytest.raises(ValueError, match="blocks.1.* would be") as error:
        save_pretrained(forget(model), tmp_path)
    assert "pass the keyword arguments" in str(error.value)
    assert not os.listdir(tmp_path)
    save_pretrained(model, tmp_path, depth=1)
    again = from_pretrained(tmp_path).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(again(x), model(x))
    # plain convolutional networks can be saved; their initialisation may need real memory
    model = forget(timm.create_model("regnety_002", num_classes=3, in_chans=1))
    save_pretrained(model, tmp_path / "conv")
    again = timm.create_model(f"local-dir:{tmp_path}/conv", pretrained=True)
    assert again.head.fc.out_features == 3 and again.stem.conv.in_channels == 1


def test_what_cannot_be_read_off_has_to_be_passed(tmp_path):
    model = forget(tiny(act_layer="relu"))
    with pytest.raises(ValueError, match=r"blocks.0.mlp.act is ReLU\(.*would be GELU"):
        save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, act_layer="relu")
    assert_equal_models(from_pretrained(tmp_path), model)


@pytest.mark.slow
def test_models_that_would_come_back_as_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_heads is 2, would be 4"):
        save_pretrained(tiny(), tmp_path, num_heads=4)
    with pytest.raises(ValueError, match="and 10 more"):
        save_pretrained(tiny(), tmp_path, depth=3)
    adapted = tiny()
    adapted.head = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 11))
    with pytest.raises(ValueError, match="head.0.weight is .64, 64., would be not there"):
        save_pretrained(adapted, tmp_path)

    class Mine(VisionTransformer):
        pass

    mine = tiny(PLAIN)
    mine.__class__ = mine.timm_class = Mine
    with pytest.raises(ValueError, match="the class is Mine, would be VisionTransformer"):
        save_pretrained(mine, tmp_path)
    with pytest.raises(ValueError, match="Sequential has no pretrained_cfg"):
        save_pretrained(nn.Sequential(tiny()), tmp_path)
    with pytest.raises(ValueError, match="norm_layer=.*cannot be written as JSON"):
        save_pretrained(tiny(), tmp_path, norm_layer=nn.LayerNorm)
    assert not os.listdir(tmp_path)
