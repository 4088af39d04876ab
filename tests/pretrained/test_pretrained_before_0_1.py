"""Folders that were saved before 0.1 load, and give the logits that they gave then."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from checking import NEIGHBOURS, assert_close, assert_differ, assert_within, relative_error
from saved_models import read

from deit_fast.pretrained import from_pretrained
from deit_fast.quantization import has_fp8_attention, quantized_layers

FOLDERS = Path(__file__).parents[1] / "data" / "before_0.1"


def stored(name):
    return safetensors.torch.load_file(FOLDERS / f"{name}_logits.safetensors")


@pytest.mark.parametrize("name", ["plain", "fp8", "int8"])
def test_a_folder_from_before_gives_its_logits(name):
    model = from_pretrained(FOLDERS / name, backend="torch").eval()
    assert model.heads == "distill"
    images, expected = stored(name)["images"], stored(name)["logits"]
    with torch.no_grad():
        got = model(images)
    if name == "plain":
        assert not quantized_layers(model)
        assert_close(got, expected)
        return
    config = read(FOLDERS / name)["deit_fast"]["quantized"]
    assert quantized_layers(model) == dict.fromkeys(config["layers"], name)
    assert has_fp8_attention(model) == (name == "fp8")
    plain = stored("plain")["logits"]
    assert_differ(expected, plain)
    # another order of summation may round a number to the neighbour
    assert_within(got, expected, NEIGHBOURS * relative_error(expected, plain))
    state = model.state_dict()
    for key, tensor in safetensors.torch.load_file(FOLDERS / name / "model.safetensors").items():
        assert torch.equal(state[key].float(), tensor.float()), key
