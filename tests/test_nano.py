"""The model whose weights come with the package."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from checking import assert_close, seeded

import deit_fast
from deit_fast.batch_inference import label_names
from deit_fast.engine import data_config
from deit_fast.images import Decoder

DATA = files("deit_fast").joinpath("data")
NAMES = {  # of the shipped images -> classes
    "t-shirt": "T-shirt/top", "trouser": "Trouser", "pullover": "Pullover", "dress": "Dress",
    "coat": "Coat", "sandal": "Sandal", "shirt": "Shirt", "sneaker": "Sneaker", "bag": "Bag",
    "ankle-boot": "Ankle boot",
}  # fmt: skip


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize("heads", ["joint", "joint_softmax", "class", "distill"])
def test_it_classifies_the_shipped_images(heads, no_network):
    model = deit_fast.deit_nano_fashion(pretrained=True, heads=heads).eval()
    decoder, labels = Decoder(data_config(model)), label_names(model)
    assert labels == list(NAMES.values())
    right = 0
    for name, label in NAMES.items():
        pixels = torch.from_numpy(decoder(DATA.joinpath("fashion", f"{name}.png")))[None]
        with torch.inference_mode():
            right += labels[model(pixels).argmax()] == label
    assert right == len(NAMES) if heads == "joint" else right >= len(NAMES) - 1


def test_what_it_is():
    model = deit_fast.deit_nano_fashion(pretrained=True)
    assert isinstance(model, deit_fast.layers.VisionTransformerDistilled)
    assert model.patch_embed.grid_size == (7, 7) and model.patch_embed.proj.in_channels == 1
    weights = DATA.joinpath("deit_nano_fashion", "model.safetensors")
    assert weights.stat().st_size < 4e6
    fresh = deit_fast.deit_nano_fashion()
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert data_config(fresh)["mean"] == data_config(model)["mean"] == (0.286,)
    assert not torch.equal(fresh.head.weight, model.head.weight)


def test_other_sizes_and_classes():
    """As with any other model: positions resized, heads initialized; other shapes if random."""
    model = deit_fast.deit_nano_fashion(pretrained=True, img_size=56)
    assert model.patch_embed.grid_size == (14, 14)
    with pytest.warns(UserWarning, match="head"):
        assert deit_fast.deit_nano_fashion(pretrained=True, num_classes=3).num_classes == 3
    assert deit_fast.deit_nano_fashion(depth=2, in_chans=3).patch_embed.proj.in_channels == 3


def test_grey_pixels_are_normalized_once():
    """Bytes inside the model are what floats are outside."""
    model = deit_fast.deit_nano_fashion(pretrained=True).eval()
    pixels = torch.from_numpy(
        np.random.default_rng(seeded(0)).integers(0, 256, (2, 28, 28, 1), np.uint8)
    )
    floats = (pixels.permute(0, 3, 1, 2) / 255 - 0.286) / 0.353
    with torch.inference_mode():
        assert_close(model(pixels), model(floats))
