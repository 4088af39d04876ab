"""Saving: the files are complete or an earlier model's, and the model is as it was."""

import os
import resource
from pathlib import Path

import pytest
import timm
import torch
from modelling import TINY
from saved_models import DISTILLED, PLAIN, assert_equal_models, tiny
from torch import nn

import deit_fast
from deit_fast.pretrained import from_pretrained, save_pretrained


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny(), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_file_keeps_the_dtype_and_models_are_fp32(dtype, tmp_path):
    model = tiny().to(dtype)
    save_pretrained(model, tmp_path)
    stored = deit_fast.checkpoint.read_checkpoint(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    assert_equal_models(from_pretrained(tmp_path), model.float())


def test_plain_compiled_and_oddly_laid_out_models_are_saved(tmp_path):
    model = tiny()
    plain = timm.create_model(DISTILLED, **TINY)
    plain.load_state_dict(model.state_dict())
    plain = plain.to(memory_format=torch.channels_last)
    plain.head_dist.weight = nn.Parameter(plain.head_dist.weight.detach().T.contiguous().T)
    plain.norm.bias = plain.blocks[0].norm1.bias  # shared memory
    model.norm.bias = model.blocks[0].norm1.bias
    assert not plain.patch_embed.proj.weight.is_contiguous()
    save_pretrained(torch.compile(plain), tmp_path)
    assert_equal_models(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("on_meta", [True, False])
def test_saving_changes_neither_the_model_nor_the_random_numbers(on_meta, tmp_path, monkeypatch):
    real = timm.create_model

    def create_model(*args, **kwargs):
        """Some networks cannot be built without memory: what they raise then, as RegNet does."""
        if torch.empty(0).is_meta:
            raise NotImplementedError("needs values")
        return real(*args, **kwargs)

    model = tiny()
    if not on_meta:
        monkeypatch.setattr(timm, "create_model", create_model)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    before, state = dict(model.pretrained_cfg), torch.get_rng_state()
    save_pretrained(model, tmp_path)
    assert model.pretrained_cfg == before and torch.equal(torch.get_rng_state(), state)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.mark.parametrize(
    "failing, earlier, links",
    [
        ("model.safetensors", True, True),
        ("config.json", True, True),
        ("config.json", True, False),
        ("config.json", False, True),
    ],
)
def test_a_failing_rename_leaves_what_was_there(failing, earlier, links, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    if earlier:
        save_pretrained(tiny(), tmp_path)
    before, real = contents(tmp_path), os.replace

    def replace(source, target):
        if Path(source).name == failing:
            raise OSError("the disk is gone")
        real(source, target)

    def no_links(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OSError, match="the disk is gone"):
        save_pretrained(tiny(PLAIN), tmp_path)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    save_pretrained(tiny(PLAIN), tmp_path)
    assert_equal_models(from_pretrained(tmp_path), tiny(PLAIN))


@pytest.mark.parametrize("limit", [100_000, 300], ids=["weights", "config"])
def test_a_full_disk_leaves_what_was_there(limit, folder, monkeypatch):
    """Files may not grow beyond the limit, which ends a write as a full disk does."""
    before = contents(folder)
    if limit < 1000:  # the weights have to fit for the config to be what fails
        monkeypatch.setattr(
            "safetensors.torch.save_file", lambda state, path, metadata: path.touch()
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = tiny(depth=3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as error:
            save_pretrained(other, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in str(error.value)
    assert contents(folder) == before


def test_the_weights_are_as_readable_as_the_config(folder):
    modes = {(folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1
